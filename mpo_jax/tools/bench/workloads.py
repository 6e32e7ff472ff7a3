"""The timed workloads: the stages' own programs, on rows of given lengths or on a configuration's own rows."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.schema import Config
from mpo_jax.data.batches import Buckets, TrainBatches
from mpo_jax.data.corpus import base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.errors import UserError
from mpo_jax.models import flops, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.pipeline.stages import STAGES, stage_settings, stage_shapes
from mpo_jax.runtime.offload import Offload
from mpo_jax.runtime.seeds import data_seed, stage_key
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages.dpo import DpoBatch
from mpo_jax.stages.packed import packing_of
from mpo_jax.stages.ppo.iteration import Loop, Models, init_ppo_state
from mpo_jax.stages.ppo.layout import packing_for
from mpo_jax.stages.settings import TrainSettings, adapter_of
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.refill import sample_all
from mpo_jax.training.update import init_state
from mpo_jax.types import Head, Packed, Params, PromptBatch, frozen

Name = Literal["sft", "reward", "dpo", "reference", "score", "generate", "sample", "ppo"]
NAMES: tuple[Name, ...] = get_args(Name)
ABOUT: dict[Name, str] = {
    "sft": "one SFT update",
    "reward": "one update of the reward model on pairs",
    "dpo": "one DPO update on pairs, reference log-probabilities given",
    "reference": "log-probabilities of pairs, as computed once before DPO",
    "score": "pair scoring, as in data selection",
    "generate": "one batch sampled to completion, as in a PPO rollout",
    "sample": "all prompts sampled twice with rows refilled, as in data selection",
    "ppo": "one PPO iteration: rollout, scores, updates of actor and critic",
}
PROGRAMS: dict[Name, str] = {
    "sft": "sft step",
    "reward": "reward step",
    "dpo": "dpo step",
    "reference": "dpo reference",
    "score": "select score",
}
"""The stage program behind each workload that consists of one program."""
RATE = 1e-5


@dataclasses.dataclass
class Workload:
    """Steps to time, with the work that each does.

    Attributes:
      run: function that starts step k and returns the arrays to wait for.
      tokens, padded: real and padded tokens of each step; sampled tokens for sampling workloads.
      flops: necessary FLOPs of each step.
      bytes_read: bytes that a decode loop must read in each step, 0 for other workloads.
      parts: seconds of the parts of a step, filled as it runs.
    """

    name: str
    run: Callable[[int], Any]
    tokens: list[int]
    padded: list[int]
    flops: list[float]
    bytes_read: list[float]
    parts: dict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))

    @property
    def steps(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Builds workloads.

    Attributes:
      batch: number of rows, pairs or prompts per step.
      rows: prompt and response lengths of synthetic rows; None for the configuration's own rows.
      vocab_size: vocabulary of the benchmark's own model, used if the configuration names none.
    """

    config: Config
    mesh: Mesh
    batch: int
    steps: int
    rows: tuple[int, int] | None
    vocab_size: int

    def __call__(self, name: Name) -> Workload:
        return getattr(self, f"_{name}")()

    def _sft(self) -> Workload:
        return self._update("sft", "lm", 1, lambda rows: rows)

    def _reward(self) -> Workload:
        return self._update("reward", "value", 2, lambda rows: rows)

    def _dpo(self) -> Workload:
        reference = None
        if self._settings("dpo").loss.needs_reference:
            reference = place_batch(np.zeros((self.batch, 2), np.float32), self.mesh)
        return self._update("dpo", "lm", 2, lambda rows: DpoBatch(rows, reference))

    def _update(self, name: Name, head: Head, num_responses: int, inputs: Any) -> Workload:
        step, settings = self._program(name), self._settings(name)
        _, params = self._trained(name, head)
        optim = _training(settings).optim
        state = [init_state(params, make_optimizer(optim), self.mesh)]

        def run(rows: Any) -> Any:
            state[0], metrics = step(with_learning_rate(state[0], RATE), inputs(rows), params["frozen"])
            return metrics

        work = partial(flops.update, adapters=adapter_of(name, self.config) is not None)
        return self._over_batches(name, run, num_responses, work, head, packed_for=settings)

    def _reference(self) -> Workload:
        params, logps = self._params(), self._program("reference")
        run, settings = lambda rows: logps(params, rows), self._settings("dpo")
        return self._over_batches("reference", run, 2, flops.necessary, "lm", packed_for=settings)

    def _score(self) -> Workload:
        params = loading.with_value_head(self._model, self._params(), self.mesh)
        score = self._program("score")
        return self._over_batches("score", lambda rows: score(params, rows), 2, flops.necessary, "value")

    def _over_batches(
        self,
        name: Name,
        run: Any,
        num_responses: int,
        work: Callable[..., Any],
        head: Head,
        *,
        packed_for: Any = None,
    ) -> Workload:
        """A workload over the steps' batches.

        Args:
          work: FLOPs of sizes, prompts' and responses' lengths, and head.
          packed_for: settings of the stage that packs these rows, unless it pads them; None: they are padded.
        """
        batches = self._batches(self._examples(num_responses))
        if packed_for is not None and getattr(packed_for, "packed", packed_for.text.packed):
            packing = packing_of(batches, _training(packed_for), self.mesh)
            batches = dataclasses.replace(batches, packing=packing)
        rows = [batches[k].rows for k in range(self.steps)]
        sizes = self._model.decoder
        works = [work(sizes, np.asarray(r.prompt_len), np.asarray(r.response_len), head) for r in rows]
        return Workload(
            name,
            lambda k: run(place_batch(batches[k].rows, self.mesh)),
            [int(np.sum(r.prompt_len) + np.sum(r.response_len)) for r in rows],
            [_columns(r) for r in rows],
            [float(work) for work in works],
            [0.0] * self.steps,
        )

    def _generate(self) -> Workload:
        model, params, (_, room) = self._model, self._params(), self._lengths
        generate = make_generate(model, Sampling(room), self._eos, self.mesh)
        batches = self._batches(self._examples(0))
        rows = [batches[k].rows for k in range(self.steps)]
        visit, key = jnp.zeros((self.batch,), jnp.uint32), jax.random.key(0)
        allowed_V = self._allowed

        def run(k: int) -> Any:
            return generate(params, place_batch(batches[k].rows, self.mesh), key, visit, allowed_V)[0].response_len

        lengths = [np.asarray(run(k)) for k in range(self.steps)]
        itemsize = jnp.dtype(model.dtype).itemsize
        works = [
            flops.sampling(model.decoder, np.asarray(r.prompt_len), n, itemsize)
            for r, n in zip(rows, lengths, strict=True)
        ]
        drawn = [int(n.sum()) for n in lengths]
        return Workload(
            "generate", run, drawn, [self.batch * int(n.max()) for n in lengths],
            [work.flops for work in works], [work.decode_reads for work in works],
        )  # fmt: skip

    def _sample(self) -> Workload:
        model, params, (_, room) = self._model, self._params(), self._lengths
        examples = self._examples(0)[: self.batch * self.steps]

        def draw() -> Any:
            return sample_all(
                model, params, examples, sampling=Sampling(room, num_samples=2), eos_id=self._eos,
                allowed_V=self._allowed, key=jax.random.key(0), batch_size=self.batch, mesh=self.mesh,
                buckets=Buckets.of(examples, self.config.text.length_buckets),
            )  # fmt: skip

        length = draw().length
        prompts = np.asarray([len(example.prompt) for example in examples])
        work = flops.sampling(model.decoder, prompts, length, jnp.dtype(model.dtype).itemsize)
        drawn = int(length.sum())
        return Workload("sample", lambda k: draw().length, [drawn], [drawn], [work.flops], [0.0])

    def _ppo(self) -> Workload:
        settings = self._settings("ppo")
        model, params = self._trained("ppo", "lm")
        _, critic = self._trained("ppo", "value")
        # with adapters reference and reward model share all but the value head
        if model.adapter is None:
            reference, judge = params, critic
        else:
            reference, judge = frozen({}), frozen({"score": jax.tree.map(jnp.copy, critic["trainable"]["score"])})
        codec: Any = SimpleNamespace(ends=self._eos, allowed=lambda _: self._allowed)
        offload = Offload.of(self.config.runtime, self.mesh)
        models = Models(model, model, params["frozen"], critic["frozen"], reference, judge)
        batches = self._batches(self._examples(0))
        packing = packing_for(settings, batches, self.mesh)
        loop = Loop(settings, self.mesh, codec, models, offload, iterations=self.steps, log_every=1, packing=packing)
        state = [init_ppo_state(settings.method, params, critic, self.mesh, offload)]
        workload = Workload("ppo", lambda k: None, [], [], [], [])

        def run(k: int) -> Any:
            state[0], metrics, kept = loop.iteration(state[0], batches[k], None)
            for name, value in metrics.items():
                if name.startswith("timing_s/"):
                    workload.parts[name.removeprefix("timing_s/")].append(value)
            return kept["samples"], metrics["perf/padding"]

        for k in range(self.steps):
            joined, padding = run(k)
            prompts, lengths = np.asarray(batches[k].rows.prompt_len), np.asarray(joined.response_len)
            epochs, adapters = settings.method.epochs, model.adapter is not None
            work = flops.ppo_iteration(
                model.decoder, model.decoder, prompts, lengths, actor_epochs=epochs, critic_epochs=epochs,
                adapters=adapters,
            )  # fmt: skip
            workload.flops.append(float(work))
            workload.tokens.append(int(prompts.sum() + lengths.sum()))
            workload.padded.append(int(padding.count))
            workload.bytes_read.append(0.0)
        workload.run = run
        return workload

    @cached_property
    def _sized(self) -> Config:
        """The configuration with this benchmark's batches and lengths."""
        config, (prompt, room) = self.config, self._lengths
        sections: dict[str, Any] = {
            "text": config.text.model_copy(update={"max_prompt_tokens": prompt, "max_response_tokens": room}),
            "select": config.select.model_copy(update={"batch_size": self.batch}),
        }
        for stage in ("sft", "reward", "dpo", "ppo"):
            section = getattr(config, stage)
            train = section.train.model_copy(update={"batch_size": self.batch})
            sections[stage] = section.model_copy(update={"train": train})
        return config.model_copy(update=sections)

    def _settings(self, stage: str) -> Any:
        return stage_settings(stage, self._sized)

    def _program(self, name: Name) -> Any:
        """The jitted function of a single-program workload, as listed by its stage."""
        wanted = PROGRAMS[name]
        stage = wanted.partition(" ")[0]
        shapes = stage_shapes(stage, self._sized, self._model.decoder, self.mesh)
        with jax.set_mesh(self.mesh):
            programs = STAGES[stage].programs(self._settings(stage), shapes)
            return next(program.function for program in programs if program.name == wanted)

    @cached_property
    def _lengths(self) -> tuple[int, int]:
        return self.rows or (self.config.text.max_prompt_tokens, self.config.text.max_response_tokens)

    @cached_property
    def _codec(self) -> TextCodec:
        return TextCodec(base_tokenizer(self.config), self.config.text)

    @property
    def _eos(self) -> int | tuple[int, ...]:
        # with given lengths, no id ends a response early
        return -1 if self.rows else self._codec.ends

    @property
    def _allowed(self) -> Any:
        size = self._model.decoder.vocab_size
        return jnp.ones((size,), bool) if self.rows else jnp.asarray(self._codec.allowed(size))

    @cached_property
    def _model(self) -> Model:
        options, path = loading.Options.of(self.config.model), self.config.model.path
        if path is not None:
            source = loading.open_model(path)
            return options.model((source if self.rows else source.fitting(self._codec.vocab_size)).decoder, self.mesh)
        vocab = self.vocab_size if self.rows else len(self._codec.tokenizer)
        return options.model(loading.from_architecture(self.config.model.architecture, vocab), self.mesh)

    def _params(self) -> Params:
        """Float32 master parameters on the mesh."""
        path = self.config.model.path
        if path is not None:
            num_ids = None if self.rows else self._codec.vocab_size
            return loading.load(path, loading.Options.of(self.config.model), self.mesh, num_ids=num_ids)[1]
        return loading.init(self._model.decoder, self.mesh, stage_key(self.config.seed, "init"))

    def _trained(self, stage: str, head: Head) -> tuple[Model, Params]:
        """What a stage trains: a whole model, or adapters on a frozen one where the configuration has them."""
        params, adapted = self._params(), adapter_of(stage, self.config)
        if adapted is not None:
            params = loading.freeze(params, loading.Options.of(self.config.model), self.mesh)
        key = stage_key(self.config.seed, "bench")
        return loading.to_train(self._model, params, adapted, self.mesh, key, new_head=head == "value")

    def _batches(self, examples: Sequence[Example]) -> TrainBatches:
        buckets = Buckets.of(examples, self.config.text.length_buckets)
        return TrainBatches(examples, buckets, self.batch, data_seed(self.config.seed, "bench"))

    def _examples(self, num_responses: int) -> list[Example]:
        if self.rows is None:
            return list(self._own_examples(num_responses))
        rng = np.random.default_rng(0)
        high, (P, S) = self._model.decoder.vocab_size, self.rows
        draw = lambda n: rng.integers(0, high, n, np.int32)  # noqa: E731
        return [Example(draw(P), [draw(S) for _ in range(num_responses)]) for _ in range(self.batch * self.steps)]

    def _own_examples(self, num_responses: int) -> Iterator[Example]:
        """The configuration's rows: demonstrations, pairs, or the prompts of selection."""
        corpus = load_corpus(self.config)
        rows: list[tuple[str, tuple[str, ...]]]
        if num_responses == 2:
            rows = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs]
        elif num_responses == 1:
            rows = [(row.prompt, (row.response,)) for row in corpus.demonstrations]
        else:
            rows = [(prompt, ()) for prompt in corpus.prompts]
        yield from tokenize(self._codec, rows, cache=self.config.runtime.token_cache_folder)[0]


def _training(settings: Any) -> TrainSettings:
    """How a stage trains, or a reward stage that could."""
    return (getattr(settings, "training", None) or settings).train


def _columns(rows: PromptBatch | Packed) -> int:
    """Columns that a batch's forward pass reads."""
    if isinstance(rows, Packed):
        return int(rows.count) * int(np.prod(rows.ids.shape[1:]))
    return int(rows.prompt.size + rows.response.size)


def check_names(names: Sequence[str]) -> tuple[Name, ...]:
    """The requested workloads; all of them if `names` is empty.

    Raises:
      UserError: for an unknown name.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"no workload is called {unknown[0]}; choose from {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in names) or NAMES
