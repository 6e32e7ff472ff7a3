"""Direct preference optimisation on pairs. Reference log-probabilities are computed once, before training."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mpo_jax.config.schema import Config, OptimConfig, Section, TextConfig
from mpo_jax.data.batches import Batch
from mpo_jax.data.records import Preference
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example
from mpo_jax.evaluation.scoring import make_score
from mpo_jax.losses import chosen_nll_loss
from mpo_jax.models import forward, loading, responses
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime import machine
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.selection import ordered_right
from mpo_jax.stages.context import Context
from mpo_jax.stages.fitting import (
    calls,
    check_sizes,
    fit_examples,
    held_out_program,
    held_out_rows,
    num_updates,
    scoring_program,
    train_program,
)
from mpo_jax.stages.packed import packing_in_order
from mpo_jax.stages.preference import Pairs, PreferenceLoss
from mpo_jax.stages.settings import Adapting, Numerics, Split, TrainSettings, adapter_of
from mpo_jax.stages.shapes import Shapes
from mpo_jax.stages.stage import Program, Stage
from mpo_jax.stages.subset import read_subset
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import jit_update
from mpo_jax.training.validation import first_rows, make_evaluate, make_measure
from mpo_jax.types import Artifact, Mean, Metrics, Tree


class Settings(Section, frozen=True):
    """Everything the policy depends on, besides the models, pairs and rows that the stage reads.

    Attributes:
      nll_coef: weight of the chosen response's NLL per token.
    """

    seed: int
    text: TextConfig
    numerics: Numerics
    adapter: Adapting = None
    save_dtype: str
    split: Split
    loss: PreferenceLoss
    nll_coef: float
    train: TrainSettings

    @classmethod
    def of(cls, config: Config, split: Split) -> "Settings":
        return cls(
            seed=config.seed,
            text=config.text,
            numerics=Numerics.of(config.model),
            adapter=adapter_of("dpo", config),
            save_dtype=machine.save_dtype(config.runtime),
            split=split,
            loss=PreferenceLoss.of(config.dpo),
            nll_coef=config.dpo.nll_coef,
            train=TrainSettings.of(config.dpo.train),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DpoBatch:
    """Pairs with their log-probabilities under the reference.

    Attributes:
      pairs: prompts with their two responses, the chosen one first: `responses.Rows`, or a `Packed` of them.
      ref_logp: [B 2] summed log-probabilities under the reference, nats; None for a loss without a reference.
    """

    pairs: Any
    ref_logp: Float[Array, "B 2"] | np.ndarray | None


def objective(
    model: Model, loss: PreferenceLoss, nll_coef: float, tree: Tree, batch: DpoBatch
) -> tuple[Metrics, Metrics]:
    """The preference loss, plus the NLL term if it has a weight."""
    rows = batch.pairs
    logp_BN = responses.logps(model, tree, rows)
    length_BN, valid_B = responses.lengths(rows), responses.valid(rows)
    ref_BN = None if batch.ref_logp is None else jnp.asarray(batch.ref_logp)
    pairs = Pairs(logp_BN, ref_BN, length_BN, valid_B)
    terms = {"loss": loss.value(pairs)}
    if nll_coef:
        nll = chosen_nll_loss(logp_BN[:, 0], length_BN[:, 0], valid_B)
        terms["loss/nll"] = Mean(nll_coef * nll.total, nll.count)
    reward_BN = loss.rewards(pairs)
    metrics = {
        "rewards/chosen": Mean.of(reward_BN[:, 0], valid_B),
        "rewards/rejected": Mean.of(reward_BN[:, 1], valid_B),
        "rewards/accuracies": Mean.of(jnp.asarray(ordered_right(reward_BN[:, 0] - reward_BN[:, 1])), valid_B),
        "rewards/margins": Mean.of(reward_BN[:, 0] - reward_BN[:, 1], valid_B),
        "logps/chosen": Mean.of(logp_BN[:, 0], valid_B),
        "logps/rejected": Mean.of(logp_BN[:, 1], valid_B),
        **responses.usage(rows),
    }
    return terms, metrics


@lru_cache
def make_step(
    model: Model, optim: OptimConfig, loss: PreferenceLoss, nll_coef: float, accumulation: int, mesh: Mesh
) -> Any:
    """The jitted (state, DpoBatch, frozen) -> (state, metrics)."""
    trainable = forward.abstract_split(model)["trainable"]
    bound = partial(objective, model, loss, nll_coef)
    return jit_update(bound, make_optimizer(optim), trainable, mesh, accumulation=accumulation)


@lru_cache
def make_held_out(model: Model, loss: PreferenceLoss, nll_coef: float, mesh: Mesh) -> Any:
    """The jitted (params, DpoBatch) -> metric means on held-out rows."""
    return make_measure(partial(objective, model, loss, nll_coef), mesh)


def check(settings: Settings, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide over the mesh: of the update, or of the reference's pass."""
    check_sizes("dpo", settings.train, mesh)


def run(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> dict[str, Any]:
    """Trains the policy `init` against `reference` and writes `model/`.

    Parents: `init`; `reference`; `pairs`, a selection (absent for DPO-base, which uses the human pairs as labelled).
    """
    train, init = settings.train, parents["init"]
    check(settings, context.mesh)
    codec = TextCodec(load_tokenizer(init.model), settings.text)
    if "pairs" in parents:
        examples = _selected(settings, context, codec, parents["pairs"])
    else:
        human = context.inputs.corpus.human_pairs(settings.split.num_prompts)
        examples = _human_examples(context, codec, human)
    held_out: list[Example] = []
    if context.watch.eval_every is not None:
        # always human pairs, even if training uses sampled ones: the same for all runs, with independent labels
        rows = first_rows(context.inputs.corpus.held_out, context.watch, "dpo")
        held_out = _human_examples(context, codec, rows)
    reference, held_out_reference = _reference_logps(settings, context, parents["reference"], examples, held_out)

    model, params = context.load_to_train(
        "dpo", init.model, settings.numerics, settings.text, adapter=settings.adapter, seed=settings.seed
    )
    loading.save_description(
        context.folder / "model", model, codec.tokenizer, dtype=settings.save_dtype, base=str(init.model)
    )
    params, trained = fit_examples(
        "dpo",
        params,
        make_step(model, train.optim, settings.loss, settings.nll_coef, train.accumulation, context.mesh),
        examples,
        seed=settings.seed,
        buckets=settings.text.length_buckets,
        train=train,
        context=context,
        model=model,
        packed=settings.text.packed,
        data=partial(_with_reference, reference),
        evaluate=make_evaluate(
            make_held_out(model, settings.loss, settings.nll_coef, context.mesh),
            held_out,
            buckets=settings.text.length_buckets,
            batch_size=train.batch_size if settings.text.packed else train.batch_size // train.accumulation,
            mesh=context.mesh,
            packing=packing_in_order(held_out, train, context.mesh) if settings.text.packed else None,
            data=partial(_with_reference, held_out_reference),
        ),
    )
    loading.save(
        context.folder / "model", model, params, codec.tokenizer, dtype=settings.save_dtype, base=str(init.model)
    )
    return {"pairs": len(examples), **trained}


def _with_reference(ref_EN: np.ndarray | None, batch: Batch) -> DpoBatch:
    """The objective's input for a batch; padding rows have reference log-probabilities of 0."""
    if ref_EN is None:
        return DpoBatch(batch.rows, None)
    return DpoBatch(batch.rows, np.where(batch.example[:, None] >= 0, ref_EN[batch.example], np.float32(0.0)))


def _reference_logps(
    settings: Settings,
    context: Context,
    reference: Artifact,
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """[E 2] float32 log-probabilities of each set under the reference, which is freed afterwards.

    Each set has its own buckets, so its results do not depend on the other one. For a loss without a reference the
    result is None, and no model is loaded.
    """
    if not settings.loss.needs_reference:
        return None, None
    model, params = context.load(reference.model, settings.numerics, settings.text, frozen=True)

    def of(name: str, examples: Sequence[Example]) -> np.ndarray | None:
        if not examples:
            return None
        return context.score(
            "dpo", name, model, params, examples, head="lm", batch_size=settings.train.batch_size,
            length_buckets=settings.text.length_buckets, source=str(reference.model),
            packing=packing_in_order(examples, settings.train, context.mesh) if settings.text.packed else None,
        )  # fmt: skip

    return of("reference", examples), of("held-out reference", held_out)


def _human_examples(context: Context, codec: TextCodec, rows: Sequence[Preference]) -> list[Example]:
    pairs = [(row.prompt, (row.chosen, row.rejected)) for row in rows]
    examples, report = context.tokenize(codec, pairs, of="human pairs")
    for message in report.findings("pairs", codec.config.max_response_tokens):
        warn(message)
    return examples


def _selected(settings: Settings, context: Context, codec: TextCodec, pairs: Artifact) -> list[Example]:
    """The selection's pairs with the chosen side first; responses keep their sampled ids."""
    table, rows = read_subset(pairs, settings.split)
    prompts, _ = context.tokenize(codec, [(table.prompt[row], ()) for row in rows])
    examples = []
    for row, example in zip(rows, prompts, strict=True):
        chosen, ids = int(table.chosen[row]), table.ids[row]
        examples.append(Example(example.prompt, [ids[chosen], ids[1 - chosen]]))
    return examples


def programs(settings: Settings, shapes: Shapes) -> Iterator[Program]:
    """The reference log-probabilities, the update and, if requested, the held-out metrics."""
    train, loss, amounts = settings.train, settings.loss, shapes.amounts
    check(settings, shapes.mesh)
    rows, pairs, scored = shapes.rows(train.batch_size, 2), None, None
    packed = settings.text.packed
    laid_out: Any = partial(shapes.packed, train=train) if packed else shapes.batch
    lengths = shapes.sampled("prompts", 2) if "pairs" in shapes.parents else shapes.lengths("pairs")
    if amounts is not None:
        whole = amounts.selected if "pairs" in shapes.parents else amounts.human_pairs
        pairs = round(settings.split.expected_share * whole)
        held_out = held_out_rows(shapes.watch, amounts.held_out)
        scored = calls(pairs, train.batch_size) + calls(held_out, train.batch_size)
    if loss.needs_reference:
        # loaded by itself, without adapters
        reference_model = dataclasses.replace(shapes.model, adapter=None)
        yield scoring_program(
            "dpo", "reference", make_score(reference_model, "lm", shapes.mesh, packed=packed),
            (shapes.frozen(), laid_out(rows)), shapes, rows, "lm", runs=scored,
            lengths=lengths,
        )  # fmt: skip

    def batch(rows: Any) -> DpoBatch:
        reference = shapes.array(rows.count, 2, dtype=jnp.float32) if loss.needs_reference else None
        return DpoBatch(laid_out(rows), reference)

    updates = None if pairs is None else num_updates(train, pairs)
    step = make_step(shapes.model, train.optim, loss, settings.nll_coef, train.accumulation, shapes.mesh)
    yield train_program(
        "dpo", "step", step, (shapes.state(train.optim), batch(rows), shapes.trained()["frozen"]), shapes, rows, "lm",
        accumulation=train.accumulation, runs=updates, lengths=lengths,
    )  # fmt: skip
    yield from held_out_program(
        "dpo", make_held_out(shapes.model, loss, settings.nll_coef, shapes.mesh), batch, shapes, 2, "lm", train=train,
        updates=updates, num_rows=None if amounts is None else amounts.held_out, packed=packed,
        held=(shapes.state(train.optim).opt_state,), lengths=shapes.lengths("pairs"),
    )  # fmt: skip


STAGE = Stage("dpo", Settings, ("init", "reference", "pairs"), frozenset({"data"}), run, programs, check, trains=True)
