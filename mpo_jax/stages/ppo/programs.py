"""What PPO compiles: the rollout, its scoring, and the updates of critic and actor."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpo_jax.data.lengths import Lengths
from mpo_jax.models import flops
from mpo_jax.models.flops import Rows, Work
from mpo_jax.runtime.sharding import batch_sharding, check_batch
from mpo_jax.stages.fitting import (
    calls,
    check_sizes,
    evaluations,
    held_out_rows,
    loop_trips,
    num_updates,
    reward_program,
    scoring_program,
    train_program,
)
from mpo_jax.stages.ppo.compiled import make_one_pass, make_score, make_scored, make_unscored, make_updates
from mpo_jax.stages.ppo.held_out import NUM_PROMPTS
from mpo_jax.stages.ppo.settings import Method, Settings
from mpo_jax.stages.sampling import rollout_programs
from mpo_jax.stages.shapes import Shapes, shaped
from mpo_jax.stages.stage import Program
from mpo_jax.types import Moments, Packed, Params, frozen


def check(settings: Settings, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide over the mesh: of prompts, or of an update's rows."""
    check_sizes("ppo", settings.train, mesh, minibatches=settings.method.minibatches)
    check_batch(settings.train.batch_size, mesh, "ppo.train.batch_size")


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
    packed = shapes.packed(rows, settings.update) if settings.packed else None
    drawn = shapes.sampled("prompts")
    longest = None if drawn is None else drawn.in_batches(train.batch_size)
    lengths = longest if packed is None else drawn
    actor, critic = shapes.state(method.actor_optim), shapes.state(method.critic_optim, "value")
    policy, critic_params = shapes.trained(), shapes.trained("value")
    rest, others = (policy["frozen"], critic_params["frozen"]), _others(shapes)
    idle, kept = () if shapes.offload_frozen else others, (shapes.between(actor), shapes.between(critic))
    # the actor's frozen part never leaves the devices
    resting = () if shapes.offload_frozen else rest[1]
    ema = (policy["trainable"],) if method.extras.ema_decay is not None else ()
    yield from rollout_programs(
        "ppo", shapes, settings.sampling, policy, train.batch_size, key=key, runs=sampled,
        held=(kept[0].opt_state, kept[1], resting, *idle, *ema), lengths=longest,
    )  # fmt: skip
    scoring = _Scoring(method, shapes, rows, lengths, key, packed)
    held = (kept[0].opt_state, kept[1].opt_state, *ema)
    if not method.in_one_pass or shapes.watch.eval_every is not None:
        yield from scoring.programs(runs=measured if method.in_one_pass else sampled, held=held)
    if shapes.text_rewards is not None:
        yield from reward_program(
            "ppo", shapes, train.batch_size, 1, key=key, runs=sampled,
            held=(*held, policy, critic_params, *idle[:1]), lengths=longest,
        )  # fmt: skip
    if method.in_one_pass:
        update = make_one_pass(model, model, method, mesh)
        joint = (
            actor, critic, rest, (others[0], scoring.reward), scoring.joined, scoring.has_eos, shapes.allowed(),
            shapes.number(), *(scoring.outside or (None,)), packed,
        )  # fmt: skip

        def whole_pass(rows: Rows) -> Work:
            adapters = model.adapter is not None
            trained = (
                flops.train(model.decoder, rows, head, model.remat, adapters=adapters) for head in ("lm", "value")
            )
            return sum(trained, scoring.frozen_work(rows))

        yield Program(
            stage="ppo", name="ppo update", batch_key="ppo.train.accumulation", function=update,
            arguments=lambda _: joint, work=whole_pass(rows), runs=runs,
            accumulation=train.accumulation, held=(*ema, *scoring.apart),
            expected=shapes.mean(lengths, rows, whole_pass, packed=packed is not None),
            loop_trips=loop_trips(joint, rows), packed=packed is not None,
        )  # fmt: skip
        return

    part = dataclasses.replace(rows, count=rows.count // method.minibatches)
    scored = scoring.scored
    whole_batch = (scored,) if method.minibatches > 1 else ()
    scored = jax.tree.map(lambda x: shapes.array(part.count, *x.shape[1:], dtype=x.dtype), scored)
    if packed is not None:
        scored = dataclasses.replace(scored, packed=shapes.packed(part, settings.update))
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


@dataclasses.dataclass(frozen=True)
class _Scoring:
    """The scoring of samples, by a reward model of the policy's tokens or from outside.

    Attributes:
      rows: a batch of samples, of these lengths.
      key: configuration key of their number.
      packed: the samples as the models read them; None: padded.
    """

    method: Method
    shapes: Shapes
    rows: Rows
    lengths: Lengths | None
    key: str
    packed: Packed | None

    @property
    def joined(self) -> Any:
        """The samples; packed ones without the prompts' ids."""
        return self.shapes.batch(self.rows if self.packed is None else dataclasses.replace(self.rows, prompt=0))

    @property
    def has_eos(self) -> Any:
        return self.shapes.array(self.rows.count, 1, dtype=jnp.bool_)

    @property
    def outside(self) -> tuple[Any, ...]:
        """The scores, where they are an argument."""
        return () if self.shapes.text_rewards is None else (self.shapes.array(self.rows.count, dtype=jnp.float32),)

    @property
    def reward(self) -> Params:
        """The reward model's parameters, where they are an argument."""
        return _others(self.shapes)[1] if self.shapes.text_rewards is None else frozen({})

    @property
    def apart(self) -> tuple[Params, ...]:
        """The reward model's parameters that are on the devices and no argument."""
        idle = self.shapes.text_rewards is not None and not self.shapes.offload_frozen
        return (self.shapes.text_reward_model,) if idle else ()

    def frozen_work(self, rows: Rows) -> Work:
        """A forward pass of every frozen model of the policy's tokens."""
        work, decoder = flops.forward(self.shapes.model.decoder, rows, "lm"), self.shapes.model.decoder
        return work if self.outside else work + flops.forward(decoder, rows, "value")

    def _work(self, rows: Rows) -> Work:
        """`frozen_work`, and a forward pass of actor and critic."""
        decoder = self.shapes.model.decoder
        trained = flops.forward(decoder, rows, "lm") + flops.forward(decoder, rows, "value")
        return trained + self.frozen_work(rows)

    @property
    def _forward(self) -> tuple[Any, tuple[Any, ...]]:
        """The program that runs the models, and its arguments."""
        method, shapes, model, mesh = self.method, self.shapes, self.shapes.model, self.shapes.mesh
        policies, critic = (shapes.trained(), _others(shapes)[0]), shapes.trained("value")
        rows = (self.joined, self.has_eos, shapes.allowed())
        if self.outside:
            return make_unscored(model, model, method, mesh), (policies, critic, *rows, self.packed)
        rest = (*rows, shapes.number(), self._moments, self.packed)
        return make_score(model, model, method, mesh), (policies, (critic, self.reward), *rest)

    @property
    def _moments(self) -> Moments | None:
        number: Any = self.shapes.number()
        return Moments(number, number, number) if self.method.score == "normalised" else None

    @property
    def _combined(self) -> tuple[Any, ...]:
        """What the program takes that puts scores from outside into a rollout."""
        function, arguments = self._forward
        rollout, entropy = shaped(jax.eval_shape(function, *arguments), batch_sharding(self.shapes.mesh))
        return (rollout, entropy, *self.outside, self.shapes.number(), self._moments, self.packed)

    @property
    def scored(self) -> Any:
        """The scored samples."""
        method, mesh = self.method, self.shapes.mesh
        function, arguments = (make_scored(method, mesh), self._combined) if self.outside else self._forward
        return shaped(jax.eval_shape(function, *arguments)[0], batch_sharding(mesh))

    def programs(self, *, runs: float | None, held: tuple[Any, ...]) -> Iterator[Program]:
        """The forward passes and, where scores come from outside, what puts them into the rollout."""
        function, arguments = self._forward
        yield dataclasses.replace(
            scoring_program(
                "ppo", "score", function, arguments, self.shapes, self.rows, "lm", key=self.key, runs=runs,
                held=(*held, *self.apart),
            ),
            work=self._work(self.rows),
            expected=self.shapes.mean(self.lengths, self.rows, self._work, packed=self.packed is not None),
        )  # fmt: skip
        if not self.outside:
            return
        combined, models = self._combined, (arguments[0], arguments[1])
        yield Program(
            stage="ppo", name="ppo scored", batch_key=self.key, function=make_scored(self.method, self.shapes.mesh),
            arguments=lambda _: combined, work=Work(0.0), runs=runs, held=(*held, *models, *self.apart),
            packed=self.packed is not None,
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
    if shapes.model.adapter is not None:
        reference = reference if shapes.own_reference else frozen({})
        reward = frozen({"score": reward["frozen"]["score"]})
    return reference, reward if shapes.text_rewards is None else shapes.text_reward_model
