"""Shared by the training stages: the training loop under a stage's settings and context, over fixed examples."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mpo_jax.config.schema import OptimConfig
from mpo_jax.data.batches import Batch, Buckets, TrainBatches, num_steps
from mpo_jax.data.lengths import Lengths
from mpo_jax.data.packing import Packing
from mpo_jax.data.tokens import Example
from mpo_jax.models import flops, forward, responses
from mpo_jax.models.flops import Rows, Work
from mpo_jax.models.forward import Model
from mpo_jax.models.packed import packed_in
from mpo_jax.runtime import device_kinds
from mpo_jax.runtime.seeds import data_seed
from mpo_jax.runtime.sharding import check_batch, place_batch
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.runtime.words import counted
from mpo_jax.stages.context import Context
from mpo_jax.stages.packed import packing_of
from mpo_jax.stages.settings import TrainSettings, Watch
from mpo_jax.stages.shapes import MULTIPLE, Shapes
from mpo_jax.stages.stage import Program
from mpo_jax.training.hashes import leaf_hashes, state_hash
from mpo_jax.training.loop import Fitted, Hooks, Step, fit
from mpo_jax.training.optimizer import make_learning_rate, make_optimizer, warmup_steps, with_learning_rate
from mpo_jax.training.tracker import PEAK_S
from mpo_jax.training.update import init_state
from mpo_jax.training.validation import HELD_OUT_ROWS, Evaluate
from mpo_jax.types import Head, Params, Tree

MIN_UPDATES = 20
"""With fewer updates a model learns little at any learning rate."""
LONG_WARMUP = 0.3
"""Fraction of a stage's updates above which a warm-up triggers a warning."""


def fit_stage(
    name: str,
    state: Any,
    step: Step,
    batches: TrainBatches,
    *,
    steps: int,
    train: TrainSettings,
    context: Context,
    evaluate: Evaluate | None = None,
    warmup: int = 0,
    model: Model | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    packing: Packing | None = None,
) -> Fitted:
    """Runs `fit` under a stage's settings and context.

    Args:
      packing: shape of the rows that the stage packs by itself; None: that of the batches, if they are packed.
      model: the model of the stage's programs, which are then announced, and compiled ahead if it is large.
      eos_id: id or ids that end a sample, if the stage samples.
      warmup: number of initial steps that may log fewer metrics than later ones.
    """
    if context.upcoming is not None and model is not None:
        context.upcoming.begin(
            model, batches.buckets.widths, responses=bool(batches.examples[0].responses), eos_id=eos_id,
            packing=packing or batches.packing,
        )  # fmt: skip
    watch, choice = context.watch, train.choice
    hooks = Hooks(
        log_every=watch.log_every,
        log=context.sinks(),
        evaluate=evaluate,
        eval_every=watch.eval_every,
        best_metric=None if choice is None else choice.metric,
        best_mode="min" if choice is None else choice.mode,
        warmup=warmup,
        stop_after_skipped=watch.stop_after_skipped,
    )
    return fit(
        state,
        step,
        batches,
        num_steps=steps,
        name=name,
        folder=context.folder,
        tensorboard=context.tensorboard,
        hooks=hooks,
        checkpoints=context.checkpointing,
    )


def fit_examples(
    name: str,
    params: Params,
    update: Callable[..., Any],
    examples: Sequence[Example],
    *,
    seed: int,
    buckets: int,
    train: TrainSettings,
    context: Context,
    data: Callable[[Batch], Any] = lambda batch: batch.rows,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    model: Model,
    head: Head = "lm",
    packed: bool = False,
) -> tuple[Params, dict[str, Any]]:
    """Trains on batches of examples; returns the parameters to export and a training summary for the manifest.

    Args:
      params: what training starts from; the trainable part's memory is taken over, so it must not be used again.
      update: jitted function (state, batch, frozen) -> (state, metrics).
      buckets: maximum number of widths that rows are grouped by, and padded to if they are not packed.
      packed: whether rows are packed.
      model, head: what trains; the model also as for `fit_stage`.
      data: function from a batch to the objective's input.
    """
    frozen = params["frozen"]
    steps = num_updates(train, len(examples))
    check_rows(name, len(examples), train.batch_size)
    check_schedule(f"{name}.train.optim", train.optim, steps)
    batches = TrainBatches(
        examples, Buckets.of(examples, buckets), train.batch_size, data_seed(seed, name), train.shuffle
    )
    if packed:
        batches = dataclasses.replace(batches, packing=packing_of(batches, train, context.mesh))
    learning_rate = make_learning_rate(train.optim, steps)
    peak = device_kinds.peak_flops(context.mesh.devices.flat)

    def step(state: Any, batch: Batch) -> tuple[Any, Any, Any]:
        rows = data(batch)
        state = with_learning_rate(state, learning_rate(batch.number))
        state, metrics = update(state, place_batch(rows, context.mesh), frozen)
        if peak is not None:
            work = flops.update(
                model.decoder, np.asarray(batch.rows.prompt_len), np.asarray(batch.rows.response_len), head,
                adapters=model.adapter is not None,
            )  # fmt: skip
            metrics = {**metrics, PEAK_S: work / peak}
        return state, metrics, rows

    def whole(trained: Tree) -> Params:
        return {"trainable": trained, "frozen": frozen}

    state, summary = fit_stage(
        name,
        init_state(params, make_optimizer(train.optim), context.mesh, donate=True),
        step,
        batches,
        steps=steps,
        train=train,
        context=context,
        evaluate=None if evaluate is None else lambda state: evaluate(whole(state.trainable)),
        model=model,
    )
    return whole(state.trainable), summary


def trained_model(params: Params) -> dict[str, str]:
    """What results about a just trained model depend on: its very bits.

    After a kill, training repeats its last steps, to the same bits on the same devices only.
    """
    return {"model": state_hash(leaf_hashes(params))}


def num_updates(train: TrainSettings, num_examples: int) -> int:
    """Number of batches that a stage trains on."""
    epochs = 1.0 if train.epochs is None else train.epochs
    return num_steps(num_examples, epochs=epochs, steps=train.steps, batch_size=train.batch_size)


def check_schedule(key: str, optim: OptimConfig, updates: int) -> None:
    """Warns if a model gets few updates or spends many of them on warm-up.

    Args:
      key: configuration key of the optimiser section, such as `sft.train.optim`.
    """
    stage = key.partition(".")[0]
    whose = "ppo's critic" if key == "ppo.critic_optim" else stage
    if updates < MIN_UPDATES:
        warn(
            f"{whose} makes {counted(updates, 'update')}, too few to train a model: give it more rows, lower "
            f"{stage}.train.batch_size, or raise {stage}.train.epochs (or train.steps, which takes precedence)"
        )
    asked, given = optim.warmup_steps, warmup_steps(optim, updates)
    if asked is not None and asked > LONG_WARMUP * updates:
        shortened = f" and is shortened to {given}" if given < asked else ""
        warn(
            f"{key}.warmup_steps={asked} is {asked / updates:.0%} of the {updates} updates{shortened}: "
            "lower it, or set it to null for a tenth of the updates"
        )


def check_rows(stage: str, num_rows: int, batch_size: int) -> None:
    """Warns if a batch contains rows more than once."""
    if num_rows < batch_size:
        warn(
            f"{stage} has {num_rows} rows for batches of {batch_size}, so a batch repeats rows: lower "
            f"{stage}.train.batch_size"
        )


def check_sizes(name: str, train: TrainSettings, mesh: Any, *, minibatches: int = 1) -> None:
    """Raises UserError if a stage's micro-batches do not divide over the mesh."""
    key = f"{name}.train.batch_size"
    check_batch(train.batch_size, mesh, key, minibatches=minibatches, accumulation=train.accumulation)


def train_program(
    name: str,
    part: str,
    update: Any,
    arguments: tuple[Any, ...],
    shapes: Shapes,
    rows: Rows,
    head: Head,
    *,
    accumulation: int,
    runs: float | None,
    held: tuple[Any, ...] = (),
    times: int = 1,
    lengths: Lengths | None = None,
) -> Program:
    """An update that differentiates `times` batches of rows with these lengths; packed if the arguments are."""

    def work(rows: Rows) -> Work:
        return flops.train(
            shapes.model.decoder, rows, head, shapes.model.remat, adapters=shapes.model.adapter is not None
        ).times(times)

    return Program(
        stage=name, name=f"{name} {part}", batch_key=f"{name}.train.accumulation", function=update,
        arguments=lambda _: arguments, work=work(rows), runs=runs, accumulation=accumulation, held=held,
        expected=shapes.mean(lengths, rows, work, packed=packed_in(arguments) is not None),
        loop_trips=loop_trips(arguments, rows), packed=packed_in(arguments) is not None,
    )  # fmt: skip


def loop_trips(arguments: tuple[Any, ...], rows: Rows) -> int | tuple[int, int]:
    """Of packed rows at full width: micro-batches, and inside them chunks of logits."""
    packed = packed_in(arguments)
    if packed is None:
        return 1
    _, count, columns = packed.ids.shape
    return -(-rows.count * rows.length // (count * columns)), -(-columns // responses.CHUNK)


def scoring_program(
    name: str,
    part: str,
    function: Any,
    arguments: tuple[Any, ...],
    shapes: Shapes,
    rows: Rows,
    head: Head,
    *,
    key: str | None = None,
    runs: float | None,
    held: tuple[Any, ...] = (),
    times: float = 1.0,
    lengths: Lengths | None = None,
) -> Program:
    """A program of `times` forward passes; the configuration key `key` sets its number of rows."""

    def work(rows: Rows) -> Work:
        return flops.forward(shapes.model.decoder, rows, head).times(times)

    return Program(
        stage=name, name=f"{name} {part}", batch_key=key or f"{name}.train.batch_size", function=function,
        arguments=lambda _: arguments, work=work(rows), runs=runs, held=held,
        expected=shapes.mean(lengths, rows, work, packed=packed_in(arguments) is not None),
        loop_trips=loop_trips(arguments, rows), packed=packed_in(arguments) is not None,
    )  # fmt: skip


def reward_program(
    name: str,
    shapes: Shapes,
    count: int,
    num_responses: int,
    *,
    masters: bool = False,
    key: str | None = None,
    runs: float | None,
    held: tuple[Any, ...] = (),
    lengths: Lengths | None = None,
) -> Iterator[Program]:
    """What a stage compiles to score `count` prompts' responses at a time: nothing where a function scores them.

    A reward model with a tokenizer of its own reads each response as a row. It is counted at the widest one, and its
    mean work at the lengths of the policy's tokens.

    Args:
      masters: whether the reward model is held as one that trains is.
    """
    own = shapes.text_rewards
    if own is None:
        rows = shapes.rows(count, num_responses)
        yield scoring_program(
            name, "score", forward.make_score_pairs(shapes.model, shapes.mesh),
            (shapes.trained("value") if masters else shapes.frozen("value"), shapes.batch(rows)), shapes, rows,
            "value", key=key, runs=runs, held=held, lengths=lengths,
        )  # fmt: skip
    elif own.model is not None:
        count *= num_responses
        up = -(-own.max_tokens // MULTIPLE) * MULTIPLE
        rows = Rows(count, up, 1, MULTIPLE)
        theirs = dataclasses.replace(shapes, model=own.model)
        found = scoring_program(
            name, "reward", forward.make_score_pairs(own.model, shapes.mesh),
            (theirs.trained("value") if masters else theirs.frozen("value"), shapes.batch(rows)), theirs, rows,
            "value", key=key, runs=runs, held=held, lengths=lengths,
        )  # fmt: skip
        yield dataclasses.replace(found, own_widths=True)


def held_out_program(
    name: str,
    measure: Any,
    batch: Callable[[Rows], Any],
    shapes: Shapes,
    num_responses: int,
    head: Head,
    *,
    train: TrainSettings,
    updates: int | None,
    num_rows: int | None,
    packed: bool,
    held: tuple[Any, ...] = (),
    lengths: Lengths | None = None,
) -> Iterator[Program]:
    """The held-out evaluation during training; no program if there is none."""
    if shapes.watch.eval_every is None:
        return
    size = train.batch_size if packed else train.batch_size // train.accumulation
    rows = shapes.rows(size, num_responses)
    runs = None
    if updates is not None and num_rows is not None:
        runs = evaluations(shapes.watch, updates) * calls(held_out_rows(shapes.watch, num_rows), size)
    yield scoring_program(
        name, "held-out", measure, (shapes.trained(head), batch(rows)), shapes, rows, head,
        key=f"{name}.train.accumulation", runs=runs, held=held, lengths=lengths,
    )  # fmt: skip


def evaluations(watch: Watch, updates: int) -> int:
    """Number of held-out evaluations during training: every `eval_every` updates and after the last one."""
    return 0 if watch.eval_every is None else -(-updates // watch.eval_every)


def held_out_rows(watch: Watch, num_rows: int, default: int = HELD_OUT_ROWS) -> int:
    """Number of held-out rows that an evaluation uses, of `num_rows`."""
    return 0 if watch.eval_every is None else min(num_rows, watch.eval_rows or default)


def calls(num_rows: int, batch_size: int) -> float:
    """Number of batches needed for `num_rows` rows."""
    return float(np.ceil(num_rows / batch_size))
