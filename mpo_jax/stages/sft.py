"""Supervised fine-tuning of the base model on the demonstrations' response tokens. No prompt loss.

With `sft.skip` nothing is trained and the base model is written as it is, for the later stages to start from.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any

import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.base import InRecipe
from mpo_jax.config.schema import ArchitectureConfig, Config, OptimConfig, Section, SftConfig, TextConfig
from mpo_jax.data.corpus import Corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import TokenReport
from mpo_jax.evaluation.scoring import make_score
from mpo_jax.losses import sft_loss
from mpo_jax.models import forward, loading, responses
from mpo_jax.models.forward import Model
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.stages.context import Context
from mpo_jax.stages.fitting import (
    calls,
    check_sizes,
    fit_examples,
    held_out_program,
    num_updates,
    scoring_program,
    train_program,
    trained_model,
)
from mpo_jax.stages.packed import packing_in_order
from mpo_jax.stages.settings import Adapting, Numerics, TrainSettings, adapter_of
from mpo_jax.stages.shapes import Shapes
from mpo_jax.stages.stage import Program, Stage
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import jit_update
from mpo_jax.training.validation import first_rows, make_evaluate, make_measure
from mpo_jax.types import Artifact, Metrics, Params, Tree


class Settings(Section, frozen=True):
    """Everything the SFT model depends on, besides the rows and the base model's files.

    Attributes:
      skip: nothing is trained; keys of training and of adapters then have their defaults.
      architecture: sizes of a model trained from scratch; None if there is a base model.
    """

    seed: int
    skip: Annotated[bool, InRecipe.UNLESS_DEFAULT] = False
    text: TextConfig
    numerics: Numerics
    adapter: Adapting = None
    save_dtype: str
    architecture: ArchitectureConfig | None
    train: TrainSettings

    @classmethod
    def of(cls, config: Config) -> "Settings":
        return cls(
            seed=config.seed if config.sft.seed is None else config.sft.seed,
            skip=config.sft.skip,
            text=config.text,
            numerics=Numerics.of(config.model),
            adapter=None if config.sft.skip else adapter_of("sft", config),
            save_dtype=machine.save_dtype(config.runtime),
            architecture=config.model.architecture if config.model.path is None else None,
            train=TrainSettings.of((SftConfig() if config.sft.skip else config.sft).train),
        )


def objective(model: Model, tree: Tree, batch: responses.Rows) -> tuple[Metrics, Metrics]:
    """Response NLL in nats per token, EOS included."""
    logp, mask = responses.token_logps(model, tree, batch)
    return {"loss": sft_loss(logp, mask)}, responses.usage(batch)


@lru_cache
def make_step(model: Model, optim: OptimConfig, accumulation: int, mesh: Mesh) -> Any:
    """The jitted (state, batch, frozen) -> (state, metrics)."""
    trainable = forward.abstract_split(model)["trainable"]
    return jit_update(partial(objective, model), make_optimizer(optim), trainable, mesh, accumulation=accumulation)


@lru_cache
def make_held_out(model: Model, mesh: Mesh) -> Any:
    """The jitted (params, batch) -> metric means on held-out rows."""
    return make_measure(partial(objective, model), mesh)


def check(settings: Settings, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide over the mesh."""
    if not settings.skip:
        check_sizes("sft", settings.train, mesh)


def run(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> dict[str, Any]:
    """Trains, writes `model/`, and returns row counts, the last metrics and the held-out NLL per token.

    With `skip`, writes the base model as `model/` and returns row counts alone.
    """
    train, corpus = settings.train, context.inputs.corpus
    check(settings, context.mesh)
    _show(corpus)
    codec = TextCodec(context.inputs.tokenizer, settings.text)
    model, params = context.load_base(
        "sft", settings.numerics, codec, settings.architecture, settings.seed, adapter=settings.adapter
    )
    if settings.skip:
        loading.save(context.folder / "model", model, params, codec.tokenizer, dtype=settings.save_dtype)
        return {"data": [source.to_dict() for source in corpus.reports], "held_out_nll": None}
    loading.save_description(
        context.folder / "model", model, codec.tokenizer, dtype=settings.save_dtype, base=context.inputs.base
    )
    rows = [(row.prompt, (row.response,)) for row in corpus.demonstrations]
    examples, report = context.tokenize(codec, rows, of="demonstrations")
    _warn_of_inputs(settings, context, report)
    held_out = first_rows(corpus.held_out, context.watch, "sft")
    measured, _ = context.tokenize(codec, [(row.prompt, (row.chosen,)) for row in held_out])
    params, trained = fit_examples(
        "sft",
        params,
        make_step(model, train.optim, train.accumulation, context.mesh),
        examples,
        seed=settings.seed,
        buckets=settings.text.length_buckets,
        train=train,
        context=context,
        model=model,
        packed=settings.text.packed,
        evaluate=make_evaluate(
            make_held_out(model, context.mesh),
            measured,
            buckets=settings.text.length_buckets,
            batch_size=train.batch_size if settings.text.packed else train.batch_size // train.accumulation,
            mesh=context.mesh,
            packing=packing_in_order(measured, train, context.mesh) if settings.text.packed else None,
        ),
    )
    base = context.inputs.base
    loading.save(context.folder / "model", model, params, codec.tokenizer, dtype=settings.save_dtype, base=base)
    return {
        "data": [source.to_dict() for source in corpus.reports],
        "tokens": report.to_dict(),
        **trained,
        "held_out_nll": _held_out_nll(settings, context, model, params, codec),
    }


def _held_out_nll(settings: Settings, context: Context, model: Model, params: Params, codec: TextCodec) -> float | None:
    """NLL in nats per token of the held-out chosen responses; None if nothing is held out."""
    held_out = context.inputs.corpus.held_out
    if not held_out:
        return None
    examples, _ = context.tokenize(codec, [(row.prompt, (row.chosen,)) for row in held_out])
    train = settings.train
    logp_EN = context.score(
        "sft", "held-out", model, params, examples, head="lm", batch_size=train.batch_size,
        length_buckets=settings.text.length_buckets, source="the SFT model", of=trained_model(params),
        packing=packing_in_order(examples, train, context.mesh) if settings.text.packed else None,
    )  # fmt: skip
    return -float(logp_EN.sum(dtype=np.float64)) / sum(len(ids) for example in examples for ids in example.responses)


def _warn_of_inputs(settings: Settings, context: Context, tokens: TokenReport) -> None:
    if context.inputs.is_toy and context.inputs.base is not None:
        warn(
            "model.path is set and data.kind is toy: a pretrained model learns the toy world. To train on your own "
            "rows, set data.path and data.kind"
        )
    if 2 * tokens.truncated_prompts > tokens.rows:
        warn(
            f"{tokens.truncated_prompts} of {tokens.rows} demonstrations' prompts are cut to "
            f"text.max_prompt_tokens={settings.text.max_prompt_tokens}: raise it"
        )


def _show(corpus: Corpus) -> None:
    """SFT is the first stage of every run: what was read is said once, here."""
    for source in corpus.reports:
        dropped = "".join(f", {count} dropped: {reason}" for reason, count in source.dropped.items())
        console.print(f"  {source.source}: {source.read} rows read, {source.kept} kept{dropped}", soft_wrap=True)
    console.print(f"  {corpus.sizes}", soft_wrap=True)


def programs(settings: Settings, shapes: Shapes) -> Iterator[Program]:
    """The update, the held-out metrics if requested, and the final held-out NLL; none with `skip`."""
    if settings.skip:
        return
    train, amounts = settings.train, shapes.amounts
    check(settings, shapes.mesh)
    rows, updates = (
        shapes.rows(train.batch_size, 1),
        None if amounts is None else num_updates(train, amounts.demonstrations),
    )
    packed = settings.text.packed
    batch = partial(shapes.packed, train=train) if packed else shapes.batch
    yield train_program(
        "sft", "step", make_step(shapes.model, train.optim, train.accumulation, shapes.mesh),
        (shapes.state(train.optim), batch(rows), shapes.trained()["frozen"]), shapes, rows, "lm",
        accumulation=train.accumulation, runs=updates, lengths=shapes.lengths("demonstrations"),
    )  # fmt: skip
    yield from held_out_program(
        "sft", make_held_out(shapes.model, shapes.mesh), batch, shapes, 1, "lm", train=train, updates=updates,
        num_rows=None if amounts is None else amounts.held_out, packed=packed,
        held=(shapes.state(train.optim).opt_state,), lengths=shapes.lengths("demonstrations"),
    )  # fmt: skip
    yield scoring_program(
        "sft", "nll", make_score(shapes.model, "lm", shapes.mesh, packed=packed),
        (shapes.trained(), batch(rows)), shapes, rows, "lm",
        runs=None if amounts is None else calls(amounts.held_out, train.batch_size),
        lengths=shapes.lengths("demonstrations"),
    )  # fmt: skip


STAGE = Stage("sft", Settings, (), frozenset({"data", "base"}), run, programs, check, trains=True)
