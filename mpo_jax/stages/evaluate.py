"""Evaluation of one policy on held-out prompts: raw reward, true utility if known, length, EOS rate, KL to SFT."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.schema import Config, Section, TextConfig
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import SHOWN
from mpo_jax.evaluation.statistics import mean_and_se
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.ops import kl_k1, masked_sum
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import check_batch, place_batch, replicated
from mpo_jax.stages.context import Context
from mpo_jax.stages.fitting import calls, reward_program, scoring_program
from mpo_jax.stages.sampling import refill_programs
from mpo_jax.stages.scorer import SharedTokens, open_scorer
from mpo_jax.stages.settings import Numerics
from mpo_jax.stages.shapes import Shapes
from mpo_jax.stages.stage import Program, Stage
from mpo_jax.training.refill import with_responses
from mpo_jax.types import Artifact, Params, PromptBatch, merge


class Settings(Section, frozen=True):
    """Everything the results depend on, besides the three models and the prompts."""

    seed: int
    text: TextConfig
    numerics: Numerics
    num_prompts: int | None
    batch_size: int
    greedy: bool
    temperature: float

    @classmethod
    def of(cls, config: Config) -> "Settings":
        evaluate = config.evaluate
        return cls(
            seed=config.seed,
            text=config.text,
            numerics=Numerics.of(config.model),
            num_prompts=evaluate.num_prompts,
            batch_size=evaluate.batch_size,
            greedy=evaluate.greedy,
            temperature=evaluate.temperature,
        )

    @property
    def sampling(self) -> Sampling:
        """One sample per prompt."""
        return Sampling(self.text.max_response_tokens, temperature=self.temperature, greedy=self.greedy)


@lru_cache
def make_kl(model: Model, temperature: float, mesh: Mesh) -> Any:
    """The jitted (policy, sft, batch, allowed_V) -> [B] sampled KL(policy || SFT) of each response, k1 in nats."""

    def kl(policy: Params, sft: Params, batch: PromptBatch, allowed_V: jax.Array) -> jax.Array:
        tokens = forward.join(batch)
        logp_BS, ref_BS = (
            forward.token_logp(model, merge(params), tokens, temperature=temperature, allowed_V=allowed_V)[0]
            for params in (policy, sft)
        )
        return masked_sum(kl_k1(logp_BS, ref_BS), tokens.loss_mask[:, tokens.scored_from :])

    return jax.jit(kl, out_shardings=replicated(mesh))


def check(settings: Settings, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide over the mesh."""
    check_batch(settings.batch_size, mesh, "evaluate.batch_size")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UserError if there are none."""
    if not prompts:
        raise UserError(
            "there are no test prompts to evaluate policies on: raise data.validation_fraction, name data.test_path or "
            "data.test_prompt_path, or run single stages (mpo sft, reward, select, dpo, ppo)"
        )


def run(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> dict[str, Any]:
    """Writes `samples.jsonl` with one line per prompt, and returns means with standard errors.

    A line holds the prompt as in the corpus, which pairs runs, and, if it differs, the text that the policy read as the
    field `shown`. All policies sample with the same random numbers, so their results can be compared prompt by prompt.
    """
    check(settings, context.mesh)
    policy, sft, reward = (parents[role] for role in ("policy", "sft", "reward"))
    corpus, mesh, numerics, text = context.inputs.corpus, context.mesh, settings.numerics, settings.text
    codec = TextCodec(load_tokenizer(policy.model), text)
    model, params = context.load(policy.model, numerics, text, frozen=True)
    sft_params = context.load(sft.model, numerics, text, frozen=True)[1]
    scorer = open_scorer(context, reward, codec, numerics)

    prompts = corpus.test_prompts[: settings.num_prompts]
    check_prompts(prompts)
    examples, report = context.tokenize(codec, [(prompt, ()) for prompt in prompts])
    allowed_V = jnp.asarray(codec.allowed(model.decoder.vocab_size))
    found = context.sample(
        "evaluate", model, params, examples, codec, sampling=settings.sampling,
        key=stage_key(settings.seed, "evaluate"), batch_size=settings.batch_size, source=policy.model,
    )  # fmt: skip
    kl = make_kl(model, settings.temperature, mesh)

    def measure_kl(batch: PromptBatch) -> jax.Array:
        return kl(params, sft_params, batch, allowed_V)

    answered = with_responses(examples, found)
    buckets, against = Buckets.of(answered, text.length_buckets), f"{policy.model} against {sft.model}"
    of = {"batch_size": settings.batch_size, "length_buckets": text.length_buckets}

    def run_pass(name: str, measure: Callable[[PromptBatch], Any], models: Any) -> Any:
        with context.running("evaluate", name, answered, of) as (keep, progress):
            return map_batches(
                answered, buckets, settings.batch_size, lambda batch: measure(place_batch(batch, mesh)), models=models,
                keep=keep, progress=progress,
            )  # fmt: skip

    if isinstance(scorer, SharedTokens):
        score = forward.make_score_pairs(scorer.model, mesh)

        def measure(batch: PromptBatch) -> Any:
            return score(scorer.params, batch)[:, 0], measure_kl(batch)

        scores, kls = run_pass("measures", measure, (scorer.source, against))
    else:
        scores = scorer.scores("evaluate", "scores", prompts, answered, batch_size=settings.batch_size)[:, 0]
        kls = run_pass("kl", measure_kl, against)
    ids, length, has_eos = found.ids[:, 0], found.length[:, 0], found.has_eos[:, 0]
    responses = [codec.decode(row[:n]) for row, n in zip(ids, length, strict=True)]
    columns: dict[str, np.ndarray] = {"score": scores, "kl": kls, "length": length, "has_eos": has_eos}
    if corpus.utility is not None:
        columns["utility"] = np.asarray([corpus.utility(p, r) for p, r in zip(prompts, responses, strict=True)])
    if is_main():
        shown = codec.as_seen(prompts)
        with (context.folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                values: dict[str, Any] = {name: column[row].item() for name, column in columns.items()}
                if (category := corpus.category(prompt)) is not None:
                    values["category"] = category
                # a chat prompt is already rendered; the field marks it as such for readers of the file
                if text.chat or shown[row] != prompt:
                    values[SHOWN] = shown[row]
                file.write(json.dumps({"prompt": prompt, "response": response, **values}, ensure_ascii=False) + "\n")
    summary: dict[str, Any] = {"prompts": len(prompts), "truncated_prompts": report.truncated_prompts}
    for name, column in columns.items():
        summary[name], summary[f"{name}_se"] = mean_and_se(column.astype(np.float64))
    return summary


def programs(settings: Settings, shapes: Shapes) -> Iterator[Program]:
    """Sampling with refilled rows, scoring, and the KL to SFT."""
    size, num_prompts = settings.batch_size, None
    if shapes.amounts is not None:
        num_prompts = min(shapes.amounts.test_prompts, settings.num_prompts or shapes.amounts.test_prompts)
    rows, policy = shapes.rows(size, 1), shapes.frozen()
    reward_model = shapes.frozen("value") if shapes.text_rewards is None else shapes.text_reward_model
    lengths = shapes.sampled("test_prompts")
    yield from refill_programs(
        "evaluate", shapes, settings.sampling, policy, size, num_prompts=num_prompts, held=(policy, reward_model),
        lengths=lengths,
    )  # fmt: skip
    runs, key = None if num_prompts is None else calls(num_prompts, size), "evaluate.batch_size"
    yield from reward_program("evaluate", shapes, size, 1, key=key, runs=runs, held=(policy, policy), lengths=lengths)
    yield scoring_program(
        "evaluate", "kl", make_kl(shapes.model, settings.temperature, shapes.mesh),
        (policy, policy, shapes.batch(rows), shapes.allowed()), shapes, rows, "lm", key=key, runs=runs, times=2.0,
        held=(reward_model,), lengths=lengths,
    )  # fmt: skip


STAGE = Stage(
    "evaluate", Settings, ("policy", "sft", "reward"), frozenset({"data", "reward_function"}), run, programs, check
)
