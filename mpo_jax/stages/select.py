"""Data selection: two samples per prompt from the SFT model, scored in one batched vmap pass; every pair is kept.

Pairs may also be the labelled ones, or those of rows that bring their scores; the latter need no reward model.

The easy/hard split is a filter over the stored table, so this stage does not depend on the threshold.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.schema import Config, Section, TextConfig
from mpo_jax.data.corpus import Corpus
from mpo_jax.data.pair_table import Border, PairTable
from mpo_jax.data.records import Preference
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, number_visits
from mpo_jax.errors import UserError
from mpo_jax.evaluation.calibration import accuracy_by_gap, against_truth
from mpo_jax.models.generate import Sampling
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.console import console
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.selection import rank, split
from mpo_jax.stages.context import Context
from mpo_jax.stages.fitting import calls, reward_program
from mpo_jax.stages.sampling import refill_programs
from mpo_jax.stages.scorer import open_scorer
from mpo_jax.stages.settings import Numerics
from mpo_jax.stages.shapes import Shapes
from mpo_jax.stages.stage import Program, Stage
from mpo_jax.training.refill import with_responses
from mpo_jax.types import Artifact

THRESHOLDS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
HISTOGRAM_BINS = 40


class Settings(Section, frozen=True):
    """Everything the table of pairs depends on, besides the two models and the rows."""

    seed: int
    text: TextConfig
    numerics: Numerics
    pair_source: Literal["sampled", "human", "scored"]
    temperature: float
    top_p: float
    num_prompts: int | None
    batch_size: int

    @classmethod
    def of(cls, config: Config) -> "Settings":
        select = config.select
        return cls(
            seed=config.seed,
            text=config.text,
            numerics=Numerics.of(config.model),
            pair_source=select.pair_source,
            temperature=select.temperature,
            top_p=select.top_p,
            num_prompts=select.num_prompts,
            batch_size=select.batch_size,
        )

    @property
    def sampling(self) -> Sampling:
        """Two samples per prompt."""
        return Sampling(
            max_new_tokens=self.text.max_response_tokens, num_samples=2, temperature=self.temperature, top_p=self.top_p
        )


def check(settings: Settings, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide over the mesh."""
    if settings.pair_source != "scored":
        check_batch(settings.batch_size, mesh, "select.batch_size")


def run(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> dict[str, Any]:
    """Writes `pairs.parquet`; returns sizes by threshold, the gap histogram and, if known, accuracy by gap."""
    check(settings, context.mesh)
    sft, corpus = parents["sft"], context.inputs.corpus
    codec = TextCodec(load_tokenizer(sft.model), settings.text)
    if settings.pair_source == "sampled":
        prompts = corpus.sampled_prompts(settings.num_prompts)
        examples = _sampled(settings, context, codec, sft, prompts)
        pairs, labels = [], None
    else:
        pairs = corpus.human_pairs(settings.num_prompts)
        examples, _ = context.tokenize(codec, [(row.prompt, (row.chosen, row.rejected)) for row in pairs])
        prompts = [row.prompt for row in pairs]
        labels = np.zeros(len(prompts), np.int32)

    if settings.pair_source == "scored":
        score_BN = _given_scores(pairs)
        texts = [(row.chosen, row.rejected) for row in pairs]
    else:
        scorer = open_scorer(context, parents["reward"], codec, settings.numerics)
        score_BN = scorer.scores("select", "scores", prompts, examples, batch_size=settings.batch_size)
        texts = [(codec.decode(e.responses[0]), codec.decode(e.responses[1])) for e in examples]
    table = _table(prompts, texts, examples, score_BN, labels, corpus)
    if is_main():
        table.write(context.folder)
    summary = describe(table)
    _show(summary)
    return summary


def _sampled(
    settings: Settings, context: Context, codec: TextCodec, sft: Artifact, prompts: list[str]
) -> list[Example]:
    """The prompts, each with two responses sampled from the SFT model."""
    model, params = context.load(sft.model, settings.numerics, settings.text, frozen=True)
    examples = number_visits(context.tokenize(codec, [(prompt, ()) for prompt in prompts])[0])
    found = context.sample(
        "select", model, params, examples, codec, sampling=settings.sampling, key=stage_key(settings.seed, "select"),
        batch_size=settings.batch_size, source=sft.model,
    )  # fmt: skip
    return with_responses(examples, found)


def _given_scores(pairs: Sequence[Preference]) -> np.ndarray:
    """[pairs, 2] float64 scores that the rows bring.

    Raises:
      UserError: if a row brings none.
    """
    scores = [row.scores for row in pairs]
    if missing := [row for row, given in zip(pairs, scores, strict=True) if given is None]:
        raise UserError(
            f"{len(missing)} of {len(pairs)} rows of data.path bring no scores, first the one of the prompt "
            f"{missing[0].prompt[:60]!r}: give rows {{prompt, responses, scores}}"
        )
    return np.asarray(scores, np.float64)


def _table(
    prompts: list[str],
    texts: list[tuple[str, str]],
    examples: list[Example],
    score_BN: np.ndarray,
    labels: np.ndarray | None,
    corpus: Corpus,
) -> PairTable:
    if labels is None:
        order, gap = rank(jnp.asarray(score_BN))
        chosen, gap = np.asarray(order)[:, 0], np.asarray(gap)
    else:
        # which side is better is known, by a label or by the row's own scores. For a label the gap says how far the
        # reward model agrees. Rounded here as the file will round it, so that every split is of the same numbers.
        chosen, gap = labels, (score_BN[:, 0] - score_BN[:, 1]).astype(np.float32)
    utility = np.full((len(prompts), 2), np.nan)
    if corpus.utility is not None:
        utility = np.asarray(
            [[corpus.utility(p, text) for text in pair] for p, pair in zip(prompts, texts, strict=True)], np.float64
        )
    ids = [(e.responses[0], e.responses[1]) for e in examples]
    return PairTable(prompts, texts, ids, np.asarray(score_BN, np.float32), chosen, gap, utility)


def describe(table: PairTable, border: Border | None = None) -> dict[str, Any]:
    """Sizes and label accuracy of the easy and hard sides at each threshold, the gap histogram, and accuracy by gap.

    Args:
      border: additional split to include.
    """
    own = set() if border is None else {table.threshold(border)}
    sizes = []
    for threshold in sorted({*THRESHOLDS, *own} - {float("-inf")}):
        easy = np.asarray(split(table.gap, threshold))
        sizes.append(
            {
                "threshold": threshold,
                "easy": int(easy.sum()),
                "hard": int((~easy).sum()),
                "easy_accuracy": table.label_accuracy(np.flatnonzero(easy)),
                "hard_accuracy": table.label_accuracy(np.flatnonzero(~easy)),
            }
        )
    counts, edges = np.histogram(table.gap, HISTOGRAM_BINS)
    summary: dict[str, Any] = {
        "pairs": len(table),
        "sizes": sizes,
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "identical": sum(np.array_equal(a, b) for a, b in table.ids),
    }
    signed = against_truth(np.abs(table.gap), table.truth)
    if len(signed):
        summary["accuracy_by_gap"] = accuracy_by_gap(signed)
    return summary


def _show(summary: dict[str, Any]) -> None:
    counts, edges = summary["histogram"]["counts"], summary["histogram"]["edges"]
    tallest = max(counts)
    bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // tallest)] for count in counts)
    console.print(f"  gaps {edges[0]:.2f} |{bars}| {edges[-1]:.2f}")
    for row in summary["sizes"]:
        accuracy = "" if row["easy_accuracy"] is None else f", true order right in {row['easy_accuracy']:.1%} of easy"
        console.print(f"  threshold {row['threshold']:g}: {row['easy']} easy, {row['hard']} hard{accuracy}")


def programs(settings: Settings, shapes: Shapes) -> Iterator[Program]:
    """Sampling with refilled rows, and pair scoring; none of rows that bring their scores."""
    amounts, size = shapes.amounts, settings.batch_size
    if settings.pair_source == "sampled":
        prompts = None if amounts is None else amounts.prompts
        yield from refill_programs(
            "select", shapes, settings.sampling, shapes.frozen(), size, num_prompts=prompts,
            lengths=shapes.sampled("prompts", settings.sampling.num_samples),
        )  # fmt: skip
    if settings.pair_source == "scored":
        return
    human = settings.pair_source == "human"
    yield from reward_program(
        "select", shapes, size, 2, key="select.batch_size",
        runs=None if amounts is None else calls(amounts.selected, size),
        lengths=shapes.lengths("pairs") if human else shapes.sampled("prompts", 2),
    )  # fmt: skip


STAGE = Stage("select", Settings, ("sft", "reward"), frozenset({"data", "reward_function"}), run, programs, check)
