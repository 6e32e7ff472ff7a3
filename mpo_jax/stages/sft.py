"""Supervised fine-tuning: the base model learns the demonstrations' response tokens. No prompt loss, no packing."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mpo_jax.config.schema import Config, OptimConfig
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.corpus import Corpus, base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import TokenReport, tokenize
from mpo_jax.losses import sft_loss
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.ops import masked_sum
from mpo_jax.runtime.console import console
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.training.loop import check_sizes, fit_examples, make_update, state_sharding
from mpo_jax.training.validation import first_rows, make_evaluate, make_measure
from mpo_jax.types import Metrics, Params, PromptBatch


def objective(model: Model, params: Params, batch: PromptBatch) -> tuple[Metrics, Metrics]:
    """Response NLL in nats per token, EOS included."""
    tokens = forward.join(batch)
    logp_BS, _ = forward.token_logp(model, params, tokens)
    loss = sft_loss(logp_BS, tokens.loss_mask[:, tokens.scored_from :])
    return {"loss": loss}, {"tokens": (tokens.segment > 0).sum()}


@lru_cache
def make_step(model: Model, optim: OptimConfig, accumulation: int, mesh: Mesh) -> Any:
    """The jitted (state, batch, learning_rate) -> (state, metrics)."""
    return jax.jit(
        make_update(partial(objective, model), optim, accumulation=accumulation),
        donate_argnums=0,
        out_shardings=(state_sharding(model, optim, mesh), replicated(mesh)),
    )


@lru_cache
def make_held_out(model: Model, mesh: Mesh) -> Any:
    """The jitted (params, batch) -> means on held-out rows."""
    return make_measure(partial(objective, model), mesh)


@lru_cache
def make_nll(model: Model, mesh: Mesh) -> Any:
    """A jitted (params, batch) -> each row's summed response NLL [B] and response tokens [B]."""

    def nll(params: Params, batch: PromptBatch) -> tuple[jax.Array, jax.Array]:
        tokens = forward.join(batch)
        logp_BS, _ = forward.token_logp(model, params, tokens)
        mask_BS = tokens.loss_mask[:, tokens.scored_from :]
        return -masked_sum(logp_BS, mask_BS), mask_BS.sum(-1)

    return jax.jit(nll, out_shardings=replicated(mesh))


def run(config: Config, mesh: Mesh, folder: Path) -> dict[str, Any]:
    """Trains, writes `model/`, and returns counts, the last metrics and the held-out NLL per token."""
    check_sizes(config, config.sft.train, "sft")
    train = config.sft.train
    corpus = load_corpus(config)
    codec = TextCodec(base_tokenizer(config), config.text)
    model, params = loading.load_base(config, codec, mesh, stage_key(config.seed, "init"))

    loading.save_description(folder / "model", model, codec)

    cache = config.runtime.token_cache_folder
    examples, report = tokenize(codec, [(row.prompt, (row.response,)) for row in corpus.demonstrations], cache=cache)
    _show(corpus, report)
    _warn_of_inputs(config, report)
    rows = first_rows(corpus.held_out, train, "sft")
    measured, _ = tokenize(codec, [(row.prompt, (row.chosen,)) for row in rows], cache=cache)
    params, trained = fit_examples(
        params,
        make_step(model, train.optim, train.accumulation, mesh),
        examples,
        config=config,
        train=train,
        mesh=mesh,
        folder=folder,
        stage="sft",
        evaluate=make_evaluate(
            make_held_out(model, mesh), measured, buckets=config.text.length_buckets, train=train, mesh=mesh
        ),
    )
    loading.save(folder / "model", model, params, codec)

    return {
        "data": [source.to_dict() for source in corpus.reports],
        "tokens": report.to_dict(),
        **trained,
        "held_out_nll": _held_out_nll(config, mesh, model, params, corpus, codec),
    }


def _held_out_nll(
    config: Config, mesh: Mesh, model: Model, params: Params, corpus: Corpus, codec: TextCodec
) -> float | None:
    """Nats per token of the held-out chosen responses; None where nothing is held out."""
    if not corpus.held_out:
        return None
    rows = [(row.prompt, (row.chosen,)) for row in corpus.held_out]
    held_out, _ = tokenize(codec, rows, cache=config.runtime.token_cache_folder)
    nll = make_nll(model, mesh)
    total, count = map_batches(
        held_out,
        Buckets.of(held_out, config.text.length_buckets),
        config.sft.train.batch_size,
        lambda batch: nll(params, place_batch(batch, mesh)),
        models=("the SFT model", "the SFT model"),
    )
    return float(total.sum() / count.sum())


def _warn_of_inputs(config: Config, tokens: TokenReport) -> None:
    if config.data.kind == "toy" and config.model.path is not None:
        warn(
            "model.path is set and data.kind is toy: a pretrained model learns the toy world. To train on rows of your "
            "own, name data.path and data.kind"
        )
    if 2 * tokens.truncated_prompts > tokens.rows:
        warn(
            f"{tokens.truncated_prompts} of {tokens.rows} demonstrations' prompts are cut to "
            f"text.max_prompt_tokens={config.text.max_prompt_tokens}: raise it"
        )


def _show(corpus: Corpus, tokens: TokenReport) -> None:
    for source in corpus.reports:
        dropped = "".join(f", {count} dropped: {reason}" for reason, count in source.dropped.items())
        console.print(f"  {source.source}: {source.read} rows read, {source.kept} kept{dropped}", soft_wrap=True)
    console.print(
        f"  {corpus.sizes}; "
        f"cut to fit: {tokens.truncated_prompts} prompts, {tokens.truncated_responses} responses of the demonstrations",
        soft_wrap=True,
    )
