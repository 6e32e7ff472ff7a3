"""The seam to the stages: for each of their programs the very function that is jitted there, and its arguments.

Arrays are shapes with shardings. A stage also holds what a program does not take (PPO's other models, the parameters a
training started from); that is listed, since it fills memory all the same.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mpo_jax.config.schema import Config, OptimConfig, TrainConfig
from mpo_jax.models import flops, forward, loading
from mpo_jax.models.decoder import FLOAT32
from mpo_jax.models.flops import Rows, Work
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Decoder, Sampling, make_for_decoding, make_generate
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.machine import frozen_dtype
from mpo_jax.runtime.sharding import batch_sharding, replicated
from mpo_jax.stages import dpo, evaluate, ppo_programs, reward, sft
from mpo_jax.training import refill
from mpo_jax.training.loop import check_sizes, state_sharding
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.types import Head, Moments, Params, PromptBatch, TrainState

STAGES = ("sft", "reward", "select", "dpo", "ppo", "evaluate")

MULTIPLE = 8
"""Batches' widths are rounded up to it (data.batches)."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a stage.

    Attributes:
      stage: whose it is.
      name: unique within a plan.
      train: the train section whose accumulation and the model's remat decide its memory; None for inference.
      batch_key: the configuration key that decides its rows.
      function: jitted, as the stage calls it.
      arguments: from the programs compiled before, by name, to shapes with shardings.
      held: what the stage keeps in memory besides the arguments.
      keeps: names of programs compiled before whose results it keeps too.
      work: analytic, over all devices.
      loop_trips: turns of a loop whose number the compiler cannot know.
    """

    stage: str
    name: str
    train: TrainConfig | None
    batch_key: str
    function: Any
    arguments: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    held: tuple[Any, ...]
    work: Work
    loop_trips: int = 1
    keeps: tuple[str, ...] = ()


def shaped(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and types with these shardings: a like tree of them, or one for all leaves."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def device_bytes(tree: Any) -> int:
    """Bytes that each device holds of a tree of shapes with shardings."""

    def one(leaf: Any) -> int:
        sharding = leaf.sharding
        shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
        count = 1
        for size in shape:
            count *= size
        return count * leaf.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


class Stages:
    """Every stage's programs under one configuration on one mesh."""

    def __init__(self, config: Config, decoder: DecoderConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model: Model = loading.describe(decoder, config)
        self.rows_sharding, self.everywhere = batch_sharding(mesh), replicated(mesh)

    def __iter__(self) -> Iterator[Program]:
        return self.of(STAGES)

    def of(self, stages: Sequence[str]) -> Iterator[Program]:
        """The programs of some stages; the others' settings are not looked at."""
        makers = (self._sft, self._reward, self._select, self._dpo, self._ppo, self._evaluate)
        for stage, programs in zip(STAGES, makers, strict=True):
            if stage in stages:
                yield from programs()

    # what programs are called with

    def params(self, *, head: Head = "lm") -> Params:
        """float32 master parameters."""
        shapes = forward.abstract_params(self.model.decoder, head=head)
        return shaped(shapes, forward.param_shardings(shapes, self.mesh))

    def frozen(self, *, head: Head = "lm") -> Params:
        """A model that does not train, as `weights.load_params` stores it."""
        dtype = jnp.dtype(frozen_dtype(self.config.model))

        def store(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            kept = jnp.dtype(jnp.float32) if name.endswith(FLOAT32) else dtype
            return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding)

        return jax.tree_util.tree_map_with_path(store, self.params(head=head))

    def state(self, optim: OptimConfig, *, head: Head = "lm") -> TrainState:
        """A model's training state."""
        tx = make_optimizer(optim)

        def init(params: Params) -> TrainState:
            return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

        shapes = jax.eval_shape(init, self.params(head=head))
        return shaped(shapes, state_sharding(self.model, optim, self.mesh, head=head))

    def rows(self, count: int, num_responses: int) -> Rows:
        text = self.config.text
        up = lambda n: -(-n // MULTIPLE) * MULTIPLE  # noqa: E731
        return Rows(count, up(text.max_prompt_tokens), num_responses, up(text.max_response_tokens))

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array whose leading axis is the batch."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows_sharding)

    def joined(self, rows: Rows) -> PromptBatch:
        B, N = rows.count, rows.num_responses
        return PromptBatch(
            prompt=self.array(B, rows.prompt),  # type: ignore[arg-type]
            prompt_len=self.array(B),  # type: ignore[arg-type]
            response=self.array(B, N, rows.response),  # type: ignore[arg-type]
            response_len=self.array(B, N),  # type: ignore[arg-type]
            key=self.array(B, dtype=jnp.uint32),  # type: ignore[arg-type]
        )

    def scalar(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), jnp.float32, sharding=self.everywhere)

    def allowed(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.model.decoder.vocab_size,), jnp.bool_, sharding=self.everywhere)

    def key(self) -> Any:
        return shaped(jax.eval_shape(lambda: jax.random.key(0)), self.everywhere)

    # the stages

    def _sft(self) -> Iterator[Program]:
        train, rows = self.config.sft.train, self.rows(self.config.sft.train.batch_size, 1)
        check_sizes(self.config, train, "sft")
        step = sft.make_step(self.model, train.optim, train.accumulation, self.mesh)
        arguments = (self.state(train.optim), self.joined(rows), self.scalar())
        # the stage's own name for the parameters it starts from lives as long as the training
        yield self._train("sft", "sft step", train, step, arguments, (self.params(),), rows, "lm")

    def _reward(self) -> Iterator[Program]:
        train, rows = self.config.reward.train, self.rows(self.config.reward.train.batch_size, 2)
        check_sizes(self.config, train, "reward")
        step = reward.make_step(self.model, train.optim, self.config.reward.loss, train.accumulation, self.mesh)
        arguments = (self.state(train.optim, head="value"), self.joined(rows), self.scalar())
        yield self._train("reward", "reward step", train, step, arguments, (self.params(head="value"),), rows, "value")

    def _select(self) -> Iterator[Program]:
        select, size = self.config.select, self.config.select.batch_size
        rows = self.rows(size, 2)
        if select.pair_source == "sampled":
            sampling = self._sampling(2, temperature=select.temperature, top_p=select.top_p)
            yield from self._refilled("select", sampling, self.frozen(), (), size)
        score = forward.make_score_pairs(self.model, self.mesh)
        arguments = (self.frozen(head="value"), self.joined(rows))
        work = flops.forward(self.model.decoder, rows, "value")
        yield self._infer("select", "select score", score, arguments, (), work)

    def _dpo(self) -> Iterator[Program]:
        train, rows = self.config.dpo.train, self.rows(self.config.dpo.train.batch_size, 2)
        check_sizes(self.config, train, "dpo")
        logps = forward.make_response_logps(self.model, self.mesh)
        work = flops.forward(self.model.decoder, rows, "lm")
        arguments = (self.frozen(), self.joined(rows))
        yield self._infer("dpo", "dpo reference", logps, arguments, (), work, key="dpo.train.batch_size")
        step = dpo.make_step(self.model, train.optim, dpo.DpoLoss.of(self.config.dpo), train.accumulation, self.mesh)
        batch = (self.joined(rows), self.array(rows.count, 2, dtype=jnp.float32))
        arguments = (self.state(train.optim), batch, self.scalar())
        yield self._train("dpo", "dpo step", train, step, arguments, (self.params(),), rows, "lm")

    def _ppo(self) -> Iterator[Program]:
        config, train = self.config.ppo, self.config.ppo.train
        check_sizes(self.config, train, "ppo", minibatches=config.minibatches)
        rows, sizes = self.rows(train.batch_size, 1), self.model.decoder
        actor, critic = self.state(train.optim), self.state(config.critic_optim, head="value")
        frozen = (self.frozen(), self.frozen(head="value"))
        ema = (self.params(),) if config.extras.ema_decay is not None else ()
        sampling = self._sampling(1, temperature=config.temperature, greedy=config.greedy)
        held = (actor.opt_state, critic, *frozen, *ema)
        yield from self._rollout(sampling, actor.params, held, train.batch_size)

        joined, has_eos = self.joined(rows), self.array(rows.count, 1, dtype=jnp.bool_)
        scoring = flops.forward(sizes, rows, "lm") + flops.forward(sizes, rows, "value")
        if ppo_programs.updates_in_one_pass(config):
            update = ppo_programs.make_one_pass(self.model, self.model, config, self.mesh)
            rates = self.scalar(), self.scalar()
            arguments = (actor, critic, frozen, joined, has_eos, self.allowed(), self.scalar(), rates)
            training = [flops.train(sizes, rows, head, self.model.remat) for head in ("lm", "value")]
            key, work = "ppo.train.accumulation", training[0] + training[1] + scoring
            yield Program("ppo", "ppo update", train, key, update, lambda _: arguments, ema, work)
            return

        score = ppo_programs.make_score(self.model, self.model, config, self.mesh)
        moments: Any = [self.scalar()] * 3
        arguments = (
            (actor.params, frozen[0]),
            (critic.params, frozen[1]),
            joined,
            has_eos,
            self.allowed(),
            self.scalar(),
            Moments(*moments) if config.score == "normalised" else None,
        )
        held = (actor.opt_state, critic.opt_state, *ema)
        yield self._infer("ppo", "ppo score", score, arguments, held, scoring.times(2), key="ppo.train.batch_size")

        part = dataclasses.replace(rows, count=rows.count // config.minibatches)
        scored = shaped(jax.eval_shape(score, *arguments)[0], self.rows_sharding)
        whole = (scored,) if config.minibatches > 1 else ()
        scored = jax.tree.map(lambda x: self.array(part.count, *x.shape[1:], dtype=x.dtype), scored)
        demonstrations = self.joined(part) if config.extras.ptx_coef else None
        update_actor, update_critic = ppo_programs.make_updates(self.model, self.model, config, self.mesh)
        yield self._train(
            "ppo", "ppo critic", train, update_critic, (critic, scored, self.scalar()),
            (actor, *frozen, *ema, *whole), part, "value",
        )  # fmt: skip
        yield self._train(
            "ppo", "ppo actor", train, update_actor, (actor, (scored, demonstrations), self.scalar(), self.allowed()),
            (critic, *frozen, *ema, *whole), part, "lm", times=2 if demonstrations else 1,
        )  # fmt: skip

    def _evaluate(self) -> Iterator[Program]:
        config = self.config.evaluate
        rows, sizes = self.rows(config.batch_size, 1), self.model.decoder
        policy, reward_model = self.frozen(), self.frozen(head="value")
        sampling = self._sampling(1, temperature=config.temperature, greedy=config.greedy)
        yield from self._refilled("evaluate", sampling, policy, (policy, reward_model), config.batch_size)
        score = forward.make_score_pairs(self.model, self.mesh)
        work = flops.forward(sizes, rows, "value")
        arguments = (reward_model, self.joined(rows))
        yield self._infer("evaluate", "evaluate score", score, arguments, (policy, policy), work)
        kl = evaluate.make_kl(self.model, config.temperature, self.mesh)
        work = flops.forward(sizes, rows, "lm").times(2)
        arguments = (policy, policy, self.joined(rows), self.allowed())
        yield self._infer("evaluate", "evaluate kl", kl, arguments, (reward_model,), work)

    def _train(
        self, stage: str, name: str, train: TrainConfig, function: Any, arguments: tuple[Any, ...],
        held: tuple[Any, ...], rows: Rows, head: flops.Head, *, times: int = 1,
    ) -> Program:  # fmt: skip
        work = flops.train(self.model.decoder, rows, head, self.model.remat).times(times)
        return Program(stage, name, train, f"{stage}.train.accumulation", function, lambda _: arguments, held, work)

    def _infer(
        self, stage: str, name: str, function: Any, arguments: tuple[Any, ...], held: tuple[Any, ...], work: Work,
        *, key: str | None = None,
    ) -> Program:  # fmt: skip
        return Program(stage, name, None, key or f"{stage}.batch_size", function, lambda _: arguments, held, work)

    def _sampling(self, num_samples: int, **options: Any) -> Sampling:
        return Sampling(self.config.text.max_response_tokens, num_samples=num_samples, **options)

    def _prompts(self, rows: Rows) -> PromptBatch:
        prompts = self.joined(dataclasses.replace(rows, num_responses=1, response=0))
        return dataclasses.replace(prompts, response_len=self.array(rows.count, 1))

    def _decoding(self, rows: Rows) -> Work:
        sizes, shards = self.model.decoder, self.config.mesh.batch_shards
        return flops.decode(sizes, rows, shards=shards, bytes_each=jnp.dtype(self.model.dtype).itemsize)

    def _made(self, compiled: Mapping[str, Any], name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What a program gives, laid out as it was compiled."""
        shapes = jax.eval_shape(function, *arguments)
        return shaped(shapes, compiled[name].output_shardings if name in compiled else self.rows_sharding)

    def _rollout(self, sampling: Sampling, params: Params, held: tuple[Any, ...], size: int) -> Iterator[Program]:
        """Prefill and decode of one batch; the caches lie between them as the compiled prefill lays them out."""
        generate = make_generate(self.model, sampling, 0, self.mesh)
        rows = self.rows(size, sampling.num_samples)
        prompts = self._prompts(rows)
        program = partial(Program, "ppo", train=None, batch_key="ppo.train.batch_size")
        start = (params, prompts, self.key(), self.array(size, dtype=jnp.uint32), self.allowed())
        yield program(
            name="ppo prefill", function=generate.begin, arguments=lambda _: start, held=held,
            work=flops.prefill(self.model.decoder, rows),
        )  # fmt: skip
        yield program(
            name="ppo weights", function=generate.for_decoding, arguments=lambda _: (params,), held=held,
            work=Work(0.0),
        )  # fmt: skip

        def then(compiled: Mapping[str, Any]) -> tuple[Any, ...]:
            state = self._made(compiled, "ppo prefill", generate.begin, start)
            ready = self._made(compiled, "ppo weights", generate.for_decoding, (params,))
            return ready, dataclasses.replace(state, caches=()), state.caches, prompts, self.allowed()

        decoder = Decoder(self.model, sampling, 0)
        yield program(
            name="ppo decode", function=generate.finish, arguments=then,
            # the parameters stay beside the weights made from them
            held=(params, *held), work=self._decoding(rows), loop_trips=-(-decoder.room // decoder.chunk),
        )  # fmt: skip

    def _refilled(
        self, stage: str, sampling: Sampling, params: Params, held: tuple[Any, ...], size: int
    ) -> Iterator[Program]:
        """A portion of prompts into rows that have ended, and a chunk of tokens for all rows."""
        start, insert, advance = refill.programs(self.model, sampling, 0, self.mesh)
        decoder, for_decoding = Decoder(self.model, sampling, 0), make_for_decoding(self.model)
        rows = self.rows(size, sampling.num_samples)
        part = dataclasses.replace(rows, count=refill.portion(size, self.config.mesh.batch_shards))
        prompts, num_rows = self._prompts(part), size * sampling.num_samples
        shapes = jax.eval_shape(partial(start, num_rows=num_rows), params, prompts, self.key(), self.allowed())
        state = shaped(shapes, jax.tree.map(lambda s, _: s, decoder.shardings(self.mesh), shapes))
        places = jax.ShapeDtypeStruct((part.count * sampling.num_samples,), jnp.int32, sharding=self.everywhere)
        program = partial(Program, stage, train=None, batch_key=f"{stage}.batch_size")
        yield program(
            name=f"{stage} weights", function=for_decoding, arguments=lambda _: (params,), held=held, work=Work(0.0)
        )

        def then(compiled: Mapping[str, Any]) -> tuple[Any, ...]:
            return self._made(compiled, f"{stage} weights", for_decoding, (params,)), state, self.allowed()

        yield program(
            name=f"{stage} prefill", function=insert,
            arguments=lambda _: (params, state, prompts, places, self.key(), self.allowed()),
            held=held, keeps=(f"{stage} weights",), work=flops.prefill(self.model.decoder, part),
        )  # fmt: skip
        yield program(
            name=f"{stage} decode", function=advance,
            arguments=then, held=(params, *held), loop_trips=decoder.chunk,
            work=self._decoding(rows).times(decoder.chunk / sampling.max_new_tokens),
        )  # fmt: skip
