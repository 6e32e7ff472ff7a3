"""Evaluation of one policy on held-out prompts: raw reward, true utility where known, length, EOS rate, KL to SFT."""

import contextlib
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.schema import Config
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import tokenize
from mpo_jax.evaluation.answers import SHOWN
from mpo_jax.evaluation.statistics import mean_and_se
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.ops import kl_k1, masked_sum
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import check_batch, place_batch, replicated
from mpo_jax.training.refill import sample_all, with_responses
from mpo_jax.training.tracker import Tracker
from mpo_jax.types import Artifact, Params, PromptBatch


@lru_cache
def make_kl(model: Model, temperature: float, mesh: Mesh) -> Any:
    """A jitted (policy, sft, joined, allowed_V) -> sampled KL(policy || SFT) of each response, k1 in nats [B]."""

    def kl(policy: Params, sft: Params, joined: PromptBatch, allowed_V: jax.Array) -> jax.Array:
        tokens = forward.join(joined)
        logp_BS, ref_BS = (
            forward.token_logp(model, params, tokens, temperature=temperature, allowed_V=allowed_V)[0]
            for params in (policy, sft)
        )
        return masked_sum(kl_k1(logp_BS, ref_BS), tokens.loss_mask[:, tokens.scored_from :])

    return jax.jit(kl, out_shardings=replicated(mesh))


def run(
    config: Config, mesh: Mesh, folder: Path, *, policy: Artifact, sft: Artifact, reward: Artifact
) -> dict[str, Any]:
    """Writes `samples.jsonl`, a line a prompt, and returns means with standard errors.

    A line holds the prompt as the corpus has it, by which runs are paired, and as the field `shown` what the policy
    read, where that differs.

    All policies draw from the same random numbers, so that differences between them pair up by prompt.
    """
    evaluate = config.evaluate
    check_batch(evaluate.batch_size, config.mesh, "evaluate.batch_size")
    corpus = load_corpus(config)
    codec = TextCodec(load_tokenizer(policy.model), config.text)
    model, params = loading.load(policy.model, config, mesh, frozen=True)
    sft_params = loading.load(sft.model, config, mesh, frozen=True)[1]
    reward_model, reward_params = loading.load(reward.model, config, mesh, head="value", frozen=True)

    prompts = corpus.test_prompts[: evaluate.num_prompts]
    examples, report = tokenize(codec, [(prompt, ()) for prompt in prompts], cache=config.runtime.token_cache_folder)
    allowed_V = jnp.asarray(codec.allowed(model.decoder.vocab_size))
    with contextlib.closing(Tracker(folder, "evaluate", len(examples), tensorboard=False)) as tracker:
        found = sample_all(
            model,
            params,
            examples,
            sampling=Sampling(
                config.text.max_response_tokens, temperature=evaluate.temperature, greedy=evaluate.greedy
            ),
            eos_id=codec.eos_id,
            allowed_V=allowed_V,
            key=stage_key(config.seed, "evaluate"),
            buckets=Buckets.of(examples, config.text.length_buckets),
            batch_size=evaluate.batch_size,
            mesh=mesh,
            name=str(policy.model),
            tell=partial(tracker.update, log=True),
        )
    score = forward.make_score_pairs(reward_model, mesh)
    kl = make_kl(model, evaluate.temperature, mesh)

    def measure(batch: PromptBatch) -> Any:
        placed = place_batch(batch, mesh)
        return score(reward_params, placed)[:, 0], kl(params, sft_params, placed, allowed_V)

    answered = with_responses(examples, found)
    buckets = Buckets.of(answered, config.text.length_buckets)
    models = str(reward.model), f"{policy.model} against {sft.model}"
    scores, kls = map_batches(answered, buckets, evaluate.batch_size, measure, models=models)
    ids, length, has_eos = found.ids[:, 0], found.length[:, 0], found.has_eos[:, 0]
    responses = [codec.decode(row[:n]) for row, n in zip(ids, length, strict=True)]
    columns: dict[str, np.ndarray] = {"score": scores, "kl": kls, "length": length, "has_eos": has_eos}
    if corpus.utility is not None:
        columns["utility"] = np.asarray([corpus.utility(p, r) for p, r in zip(prompts, responses, strict=True)])
    if is_main():
        shown = codec.as_seen(prompts)
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                values: dict[str, Any] = {name: column[row].item() for name, column in columns.items()}
                if (category := corpus.category(prompt)) is not None:
                    values["category"] = category
                # of a chat the prompt is rendered already: the field says so to whoever reads the file
                if config.text.chat or shown[row] != prompt:
                    values[SHOWN] = shown[row]
                file.write(json.dumps({"prompt": prompt, "response": response, **values}, ensure_ascii=False) + "\n")
    summary: dict[str, Any] = {"prompts": len(prompts), "truncated_prompts": report.truncated_prompts}
    for name, column in columns.items():
        summary[name], summary[f"{name}_se"] = mean_and_se(column.astype(np.float64))
    return summary
