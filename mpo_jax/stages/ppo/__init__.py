"""Proximal policy optimisation on prompts, with a KL penalty to a reference and a separate critic model.

Sources: arXiv:1707.06347, arXiv:2009.01325, DeepSpeed-Chat.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpo_jax.data.batches import Buckets, TrainBatches
from mpo_jax.data.pair_table import PairTable
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import number_visits
from mpo_jax.errors import UserError
from mpo_jax.models import flops, loading
from mpo_jax.models.flops import Rows, Work
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.console import console
from mpo_jax.runtime.offload import to_devices
from mpo_jax.runtime.seeds import data_seed
from mpo_jax.runtime.sharding import batch_sharding, check_batch
from mpo_jax.stages.context import Context
from mpo_jax.stages.fitting import (
    calls,
    check_rows,
    check_schedule,
    check_sizes,
    evaluations,
    fit_stage,
    held_out_rows,
    num_updates,
    scoring_program,
    train_program,
)
from mpo_jax.stages.ppo.compiled import make_one_pass, make_score, make_updates
from mpo_jax.stages.ppo.held_out import NUM_PROMPTS, exported, make_evaluate
from mpo_jax.stages.ppo.iteration import Loop, Models, PpoState, init_ppo_state
from mpo_jax.stages.ppo.settings import Settings
from mpo_jax.stages.ppo.widths import response_widths
from mpo_jax.stages.sampling import rollout_programs
from mpo_jax.stages.shapes import Shapes, shaped
from mpo_jax.stages.stage import Program, Stage
from mpo_jax.types import Artifact, Head, Metrics, Moments, Params, frozen


def check(settings: Settings, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide over the mesh: of prompts, or of an update's rows."""
    check_sizes("ppo", settings.train, mesh, minibatches=settings.method.minibatches)
    check_batch(settings.train.batch_size, mesh, "ppo.train.batch_size")


def run(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> dict[str, Any]:
    """Trains the actor from `init` against `reference` and writes `model/` and, if asked for, `critic/`.

    Parents: `init`; `reference`; `reward`, which scores responses and initialises the critic; `pairs`, a selection that
    supplies the prompts (absent: all training prompts).
    """
    method, train, mesh = settings.method, settings.train, context.mesh
    init = parents["init"]
    check(settings, mesh)
    codec, offload = TextCodec(load_tokenizer(init.model), settings.text), context.offload
    text = settings.text
    models, actor, critic = _load(settings, parents, context)
    actor_model, reward_model = models.actor, models.critic

    dtype = settings.save_dtype
    loading.save_description(context.folder / "model", actor_model, codec.tokenizer, dtype=dtype, base=str(init.model))
    if settings.save_critic:
        loading.save_description(context.folder / "critic", reward_model, codec.tokenizer, head="value", dtype=dtype)

    prompts = [(prompt, ()) for prompt in _prompts(settings, parents.get("pairs"), context)]
    examples = number_visits(context.tokenize(codec, prompts)[0])
    buckets, size = Buckets.of(examples, text.length_buckets), train.batch_size
    iterations, warmup = num_updates(train, len(examples)), method.extras.critic_warmup
    if warmup >= iterations:
        raise UserError(
            f"ppo.extras.critic_warmup={warmup} leaves the actor none of the {iterations} "
            "iterations: lower it, or train longer with ppo.train.epochs or ppo.train.steps"
        )
    batches = TrainBatches(examples, buckets, size, data_seed(settings.seed, "ppo"), train.shuffle)
    demonstrations = _demonstrations(settings, codec, context) if method.extras.ptx_coef else None
    check_rows("ppo", len(examples), size)
    check_schedule("ppo.train.optim", method.actor_optim, (iterations - warmup) * method.updates)
    check_schedule("ppo.critic_optim", method.critic_optim, iterations * method.updates)
    loop = Loop(settings, mesh, codec, models, offload, iterations, context.watch.log_every, context.inputs.utility)

    def step(state: PpoState, batch: Any) -> tuple[PpoState, Metrics, Any]:
        return loop.iteration(state, batch, demonstrations)

    # reference and reward model were loaded on their own, so nothing else refers to these arrays
    state = init_ppo_state(method, actor, critic, mesh, offload, donate=True)
    del actor, critic
    if narrower := response_widths(text.max_response_tokens)[:-1]:
        listed = ", ".join(map(str, narrower))
        console.print(f"  scoring and updates compile once more for each of {listed} response columns that comes up")
    state, trained = fit_stage(
        "ppo",
        state,
        step,
        batches,
        steps=iterations,
        train=train,
        context=context,
        evaluate=make_evaluate(loop, context, buckets, size),
        warmup=warmup,
        # programs are listed for one model, so nothing is said where the reward model has other sizes
        model=actor_model if actor_model == reward_model else None,
        eos_id=codec.ends,
    )
    loading.save(
        context.folder / "model", actor_model, exported(state, loop), codec.tokenizer, dtype=dtype, base=str(init.model)
    )
    if settings.save_critic:
        trained_critic = {"trainable": state.critic.trainable, "frozen": to_devices(models.critic_frozen)}
        loading.save(context.folder / "critic", reward_model, trained_critic, codec.tokenizer, dtype=dtype)
    return {"prompts": len(examples), **trained}


def _load(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> tuple[Models, Params, Params]:
    """The four models, and what the states of actor and critic begin with.

    With adapters the reward model is the critic without its adapter, and the reference the actor without its own where
    both come from one artifact; they then share every array but the value head.
    """
    init, reference, reward = (parents[role] for role in ("init", "reference", "reward"))
    numerics, text, adapted = settings.numerics, settings.text, settings.adapter is not None

    def load_frozen(artifact: Artifact, head: Head) -> Params:
        return context.offload.frozen_params(context.load(artifact.model, numerics, text, head=head, frozen=True)[1])

    reference_params = frozen({}) if adapted and reference.id == init.id else load_frozen(reference, "lm")
    reward_params = None if adapted else load_frozen(reward, "value")
    training: dict[str, Any] = {"adapter": settings.adapter, "seed": settings.seed}
    actor_model, actor = context.load_to_train("ppo", init.model, numerics, text, **training)
    reward_model, critic = context.load_to_train("ppo critic", reward.model, numerics, text, head="value", **training)
    if reward_params is None:
        # a copy, since the critic's own head trains
        reward_params = frozen({"score": jax.tree.map(jnp.copy, critic["trainable"]["score"])})
    resting = context.offload.frozen_params(frozen(critic["frozen"]))["frozen"]
    models = Models(actor_model, reward_model, actor["frozen"], resting, reference_params, reward_params)
    return models, actor, critic


def _prompts(settings: Settings, pairs: Artifact | None, context: Context) -> list[str]:
    if pairs is None:
        return context.inputs.corpus.sampled_prompts(settings.split.num_prompts)
    table = PairTable.read(pairs.path)
    prompts = [table.prompt[int(row)] for row in table.rows(settings.split.subset, settings.split)]
    return list(dict.fromkeys(prompts)) if settings.samples_once else prompts


def _demonstrations(settings: Settings, codec: TextCodec, context: Context) -> TrainBatches:
    rows = context.inputs.corpus.demonstrations
    examples, _ = context.tokenize(codec, [(row.prompt, (row.response,)) for row in rows])
    buckets, train = Buckets.of(examples, settings.text.length_buckets), settings.train
    return TrainBatches(examples, buckets, train.batch_size, data_seed(settings.seed, "ptx"), train.shuffle)


def programs(settings: Settings, shapes: Shapes) -> Iterator[Program]:
    """The rollout, its scoring, and the updates of critic and actor, at the most response columns they may work on."""
    method, train, model, mesh = settings.method, settings.train, shapes.model, shapes.mesh
    check(settings, mesh)
    rows, key = shapes.rows(train.batch_size, 1), "ppo.train.batch_size"
    runs = measured = sampled = None
    if shapes.amounts is not None:
        whole = shapes.amounts.selected if "pairs" in shapes.parents else shapes.amounts.prompts
        runs = num_updates(train, round(settings.split.expected_share * whole))
        held_out = held_out_rows(shapes.watch, shapes.amounts.test_prompts, default=NUM_PROMPTS)
        measured = evaluations(shapes.watch, runs) * calls(held_out, train.batch_size)
        sampled = runs + measured
    lengths = shapes.sampled("prompts")
    if lengths is not None:
        lengths = lengths.in_batches(train.batch_size)
    actor, critic = shapes.state(method.actor_optim), shapes.state(method.critic_optim, "value")
    policy, critic_params = shapes.trained(), shapes.trained("value")
    rest, others = (policy["frozen"], critic_params["frozen"]), _others(shapes)
    idle, kept = () if shapes.offload_frozen else others, (shapes.between(actor), shapes.between(critic))
    # the actor's frozen part never leaves the devices
    resting = () if shapes.offload_frozen else rest[1]
    ema = (policy["trainable"],) if method.extras.ema_decay is not None else ()
    yield from rollout_programs(
        "ppo", shapes, settings.sampling, policy, train.batch_size, key=key, runs=sampled,
        held=(kept[0].opt_state, kept[1], resting, *idle, *ema), lengths=lengths,
    )  # fmt: skip
    joined, has_eos = shapes.batch(rows), shapes.array(rows.count, 1, dtype=jnp.bool_)

    def scoring(rows: Rows) -> Work:
        """A forward pass of one model of each kind."""
        return flops.forward(model.decoder, rows, "lm") + flops.forward(model.decoder, rows, "value")

    score = make_score(model, model, method, mesh)
    number: Any = shapes.number()
    arguments = (
        (policy, others[0]),
        (critic_params, others[1]),
        joined,
        has_eos,
        shapes.allowed(),
        number,
        Moments(number, number, number) if method.score == "normalised" else None,
    )
    held = (kept[0].opt_state, kept[1].opt_state, *ema)
    if not method.in_one_pass or shapes.watch.eval_every is not None:
        scorings = measured if method.in_one_pass else sampled
        yield dataclasses.replace(
            scoring_program("ppo", "score", score, arguments, shapes, rows, "lm", key=key, runs=scorings, held=held),
            work=scoring(rows).times(2),
            expected=shapes.mean(lengths, rows, lambda rows: scoring(rows).times(2)),
        )
    if method.in_one_pass:
        update = make_one_pass(model, model, method, mesh)
        joint = (actor, critic, rest, others, joined, has_eos, shapes.allowed(), shapes.number())

        def whole_pass(rows: Rows) -> Work:
            adapters = model.adapter is not None
            trained = (
                flops.train(model.decoder, rows, head, model.remat, adapters=adapters) for head in ("lm", "value")
            )
            return sum(trained, scoring(rows))

        yield Program(
            stage="ppo", name="ppo update", batch_key="ppo.train.accumulation", function=update,
            arguments=lambda _: joint, work=whole_pass(rows), runs=runs,
            accumulation=train.accumulation, held=ema, expected=shapes.mean(lengths, rows, whole_pass),
        )  # fmt: skip
        return

    part = dataclasses.replace(rows, count=rows.count // method.minibatches)
    scored = shaped(jax.eval_shape(score, *arguments)[0], batch_sharding(mesh))
    whole_batch = (scored,) if method.minibatches > 1 else ()
    scored = jax.tree.map(lambda x: shapes.array(part.count, *x.shape[1:], dtype=x.dtype), scored)
    demonstrations = shapes.batch(part) if method.extras.ptx_coef else None
    update_actor, update_critic = make_updates(model, model, method, mesh)
    updates = own_updates = None
    if runs is not None:
        updates, own_updates = runs * method.updates, max(runs - method.extras.critic_warmup, 0) * method.updates
    yield train_program(
        "ppo", "critic", update_critic, (critic, scored, rest[1]), shapes, part, "value",
        accumulation=train.accumulation, runs=updates, held=(kept[0], rest[0], *idle, *ema, *whole_batch),
        lengths=lengths,
    )  # fmt: skip
    yield train_program(
        "ppo", "actor", update_actor, (actor, (scored, demonstrations), rest[0], shapes.allowed()), shapes, part, "lm",
        accumulation=train.accumulation, runs=own_updates, held=(kept[1], rest[1], *idle, *ema, *whole_batch),
        times=2 if demonstrations else 1, lengths=lengths,
    )  # fmt: skip


def offloaded(settings: Settings, shapes: Shapes) -> tuple[Any, Any]:
    """What `runtime.offload_frozen` and `runtime.offload_moments` keep in host memory: shapes with shardings.

    Returns:
      The frozen models, reference and reward model, and with adapters the critic's frozen part; and the moments of
      actor and critic.
    """
    method = settings.method
    actor, critic = shapes.state(method.actor_optim), shapes.state(method.critic_optim, "value")
    return (*_others(shapes), shapes.trained("value")["frozen"]), (actor.opt_state, critic.opt_state)


def _others(shapes: Shapes) -> tuple[Params, Params]:
    """What reference and reward model do not share with actor and critic, as `_load` finds it."""
    reference, reward = shapes.frozen(), shapes.frozen("value")
    if shapes.model.adapter is None:
        return reference, reward
    return reference if shapes.own_reference else frozen({}), frozen({"score": reward["frozen"]["score"]})


STAGE = Stage(
    "ppo", Settings, ("init", "reference", "pairs", "reward"), frozenset({"data"}), run, programs, check, trains=True
)
