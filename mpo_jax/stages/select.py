"""Data selection: two samples a prompt from the SFT model, both scored in one batched vmap pass, every pair kept.

The split into easy and hard is a filter over the stored table, so this stage does not depend on the threshold.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.schema import Config, SelectConfig
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.corpus import Corpus, load_corpus
from mpo_jax.data.pair_table import PairTable
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, number_visits, tokenize
from mpo_jax.evaluation.calibration import accuracy_by_gap, against_truth
from mpo_jax.models import forward, loading
from mpo_jax.models.generate import Sampling
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.console import console
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import check_batch, place_batch
from mpo_jax.selection import rank, split
from mpo_jax.training.refill import sample_all, with_responses
from mpo_jax.training.tracker import Tracker
from mpo_jax.types import Artifact

THRESHOLDS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
HISTOGRAM_BINS = 40


def run(config: Config, mesh: Mesh, folder: Path, *, sft: Artifact, reward: Artifact) -> dict[str, Any]:
    """Writes `pairs.parquet`; returns sizes by threshold, the gap histogram, and accuracy by gap where known."""
    check_batch(config.select.batch_size, config.mesh, "select.batch_size")
    corpus = load_corpus(config)
    codec = TextCodec(load_tokenizer(sft.model), config.text)
    if config.select.pair_source == "sampled":
        examples, prompts = _sampled(config, mesh, folder, corpus, codec, sft)
        labels = None
    else:
        pairs = corpus.human_pairs(config.select.num_prompts)
        rows = [(row.prompt, (row.chosen, row.rejected)) for row in pairs]
        examples, _ = tokenize(codec, rows, cache=config.runtime.token_cache_folder)
        prompts = [row.prompt for row in pairs]
        labels = np.zeros(len(prompts), np.int32)

    reward_model, reward_params = loading.load(reward.model, config, mesh, head="value", frozen=True)
    score = forward.make_score_pairs(reward_model, mesh)
    score_BN = map_batches(
        examples,
        Buckets.of(examples, config.text.length_buckets),
        config.select.batch_size,
        lambda batch: score(reward_params, place_batch(batch, mesh)),
        models=str(reward.model),
    )
    table = _table(prompts, examples, score_BN, labels, codec, corpus)
    if is_main():
        table.write(folder)
    summary = describe(table, config.select)
    _show(summary)
    table.warn_if_one_sided(config.select)
    return summary


def _sampled(
    config: Config, mesh: Mesh, folder: Path, corpus: Corpus, codec: TextCodec, sft: Artifact
) -> tuple[list[Example], list[str]]:
    """The training prompts, each with two responses of the SFT model."""
    model, params = loading.load(sft.model, config, mesh, frozen=True)
    sampling = Sampling(
        max_new_tokens=config.text.max_response_tokens,
        num_samples=2,
        temperature=config.select.temperature,
        top_p=config.select.top_p,
    )
    prompts = corpus.sampled_prompts(config.select.num_prompts)
    examples, _ = tokenize(codec, [(prompt, ()) for prompt in prompts], cache=config.runtime.token_cache_folder)
    examples = number_visits(examples)
    with contextlib.closing(Tracker(folder, "select", len(examples), tensorboard=False)) as tracker:
        found = sample_all(
            model,
            params,
            examples,
            sampling=sampling,
            eos_id=codec.eos_id,
            allowed_V=jnp.asarray(codec.allowed(model.decoder.vocab_size)),
            key=stage_key(config.seed, "select"),
            buckets=Buckets.of(examples, config.text.length_buckets),
            batch_size=config.select.batch_size,
            mesh=mesh,
            name=str(sft.model),
            tell=partial(tracker.update, log=True),
        )
    return with_responses(examples, found), prompts


def _table(
    prompts: list[str],
    examples: list[Example],
    score_BN: np.ndarray,
    labels: np.ndarray | None,
    codec: TextCodec,
    corpus: Corpus,
) -> PairTable:
    texts = [(codec.decode(e.responses[0]), codec.decode(e.responses[1])) for e in examples]
    if labels is None:
        order, gap = rank(jnp.asarray(score_BN))
        chosen, gap = np.asarray(order)[:, 0], np.asarray(gap)
    else:
        # people have said which side is better; the gap then tells how far the reward model agrees
        chosen, gap = labels, score_BN[:, 0] - score_BN[:, 1]
    utility = np.full((len(prompts), 2), np.nan)
    if corpus.utility is not None:
        utility = np.asarray(
            [[corpus.utility(p, text) for text in pair] for p, pair in zip(prompts, texts, strict=True)], np.float64
        )
    ids = [(np.asarray(e.responses[0]).tolist(), np.asarray(e.responses[1]).tolist()) for e in examples]
    return PairTable(prompts, texts, ids, np.asarray(score_BN, np.float32), chosen, gap, utility)


def describe(table: PairTable, config: SelectConfig) -> dict[str, Any]:
    """Sizes and label accuracy of easy and hard at each threshold, the gap histogram, and accuracy by gap."""
    thresholds = sorted({*THRESHOLDS, table.threshold(config)} - {float("-inf")})
    sizes = []
    for threshold in thresholds:
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
        "identical": int(sum(a == b for a, b in table.ids)),
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
