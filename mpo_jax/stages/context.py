"""What a stage receives besides its settings: mesh and folder, fingerprinted inputs, logging and checkpoints."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mpo_jax.config.schema import AdapterConfig, ArchitectureConfig, Config, TextConfig
from mpo_jax.data import base_model, corpus
from mpo_jax.data.batches import Progress
from mpo_jax.data.corpus import Corpus
from mpo_jax.data.digest import digest
from mpo_jax.data.packing import Packing
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, Row, TokenReport, tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.reward_function import RewardFunction, fingerprint_function, load_function
from mpo_jax.evaluation.sampling import sample_examples
from mpo_jax.evaluation.scoring import score_examples
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime import parts
from mpo_jax.runtime.console import console
from mpo_jax.runtime.offload import Offload
from mpo_jax.runtime.passes import Pass
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.words import counted
from mpo_jax.stages.compiling import Upcoming
from mpo_jax.stages.settings import NOT_WATCHED, Numerics, Watch
from mpo_jax.training.loop import Checkpointing
from mpo_jax.training.refill import Samples
from mpo_jax.training.tracker import Sink, Tracker
from mpo_jax.types import Head, Params

NO_OFFLOAD = Offload(frozen=False, moments=False)
INPUTS = frozenset({"data", "base", "reward_model", "reward_function"})
"""Inputs of stages that are not artifacts: the rows, the base model, a finished reward model, a function as reward."""


class Inputs:
    """A stage's non-artifact inputs; their fingerprints enter the names of the stages that read them.

    Args:
      reads: names of the inputs that may be read; reading another raises AssertionError.
    """

    def __init__(self, config: Config, reads: Collection[str] = INPUTS):
        # workdir and seed do not affect the inputs
        self._config = config.model_copy(update={"workdir": "", "seed": 0})
        self._reads = frozenset(reads)
        self._fingerprints: dict[str, Any] = {}

    def only(self, reads: Collection[str]) -> "Inputs":
        """The same inputs, restricted to those in `reads`."""
        narrowed = Inputs(self._config, reads)
        narrowed._fingerprints = self._fingerprints
        return narrowed

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of the readable inputs, independent of name and location; absent inputs have none."""
        config, cache = self._config, self._config.runtime.fingerprint_cache_folder
        rows = partial(corpus.fingerprint, config.data, cache, chat_template=config.text.chat_template)
        found: dict[str, Callable[[], str]] = {"data": rows}
        if config.model.path is not None:
            found["base"] = partial(base_model.fingerprint_base, config.model.path, cache)
        if config.reward.path is not None:
            found["reward_model"] = partial(base_model.fingerprint_model, config.reward.path, cache)
        if config.reward.function is not None:
            found["reward_function"] = partial(fingerprint_function, config.reward.function)
        for name in sorted(self._reads & found.keys()):
            if name not in self._fingerprints:
                self._fingerprints[name] = found[name]()
        return {name: self._fingerprints[name] for name in sorted(self._reads & found.keys())}

    @cached_property
    def corpus(self) -> Corpus:
        """All rows."""
        self._check("data")
        return corpus.load_corpus(self._config)

    @property
    def utility(self) -> Callable[[str, str], float] | None:
        """The true utility of (prompt, response) for toy data, else None."""
        self._check("data")
        return corpus.known_utility(self._config.data)

    @property
    def samples_once(self) -> bool:
        """Whether each distinct prompt is sampled once, however many rows it has."""
        self._check("data")
        return self._config.data.prompts == "unique"

    @property
    def is_toy(self) -> bool:
        """Whether the rows come from the embedded toy world."""
        self._check("data")
        return self._config.data.kind == "toy"

    @property
    def base(self) -> str | None:
        """Path or hub id of the base model; None if it is trained from scratch."""
        self._check("base")
        return self._config.model.path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, or the toy world's."""
        self._check("base")
        return corpus.base_tokenizer(self._config)

    @property
    def reward_model(self) -> str | None:
        """Path or hub id of a finished reward model to use instead of training one; None to train."""
        self._check("reward_model")
        return self._config.reward.path

    @property
    def reward_function(self) -> RewardFunction | None:
        """The function that gives rewards in place of a model, imported; None if there is none.

        Raises:
          UserError: if it cannot be imported, or is no longer the one that stages are named after.
        """
        self._check("reward_function")
        name = self._config.reward.function
        if name is None:
            return None
        function = load_function(name)
        if function.fingerprint != self.fingerprints["reward_function"]:
            raise UserError(f"{function}: its file has changed since this command began: start it again")
        return function

    def _check(self, name: str) -> None:
        assert name in self._reads, f"the stage reads {name}, which its name does not hash: declare it in Stage.inputs"


@dataclasses.dataclass(frozen=True)
class Context:
    """Where and how a stage runs. Only the inputs' content can change a result by more than rounding.

    Attributes:
      folder: folder in which the stage is made.
      watch: logging, checkpointing and held-out evaluation of a training stage.
      remat: which activations the backward pass recomputes.
      logit_chunk: number of tokens per device with logits in memory at a time.
      token_cache: folder of cached tokenized rows; None: no cache.
      checkpoints: folder of the training state; None: `folder/checkpoints`.
      before_save: callback before every checkpoint, in every process.
      recipe: recipe of the stage, stored with its checkpoints and its passes' parts.
      parents: what each parent's making has measured, hashed: a parent made again elsewhere has the same name and other
        bits, and a pass must not go on from rows of the first.
      save_minutes: time between two savings of the rows that a pass has finished; 0: after every batch.
      send_parts: callback in process 0 after each, with the pass's folder and its new files.
      sinks: factory of additional sinks for logged metrics.
      upcoming: what the stage will compile; None: nothing is said of it.
    """

    mesh: Mesh
    folder: Path
    inputs: Inputs
    watch: Watch = NOT_WATCHED
    remat: Any = "dots"
    logit_chunk: int = 1024
    offload: Offload = NO_OFFLOAD
    token_cache: Path | None = None
    tensorboard: bool = False
    checkpoints: Path | epath.Path | None = None
    before_save: Callable[[], None] | None = None
    recipe: Mapping[str, Any] | None = None
    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    save_minutes: float = 5.0
    send_parts: parts.Send | None = None
    sinks: Callable[[], Sequence[Sink]] = tuple
    upcoming: Upcoming | None = None

    def options(self, numerics: Numerics) -> loading.Options:
        """Options for loading and running models."""
        return loading.Options(
            dtype=numerics.compute_dtype,
            frozen_dtype=numerics.frozen_dtype,
            remat=self.remat,
            attention=numerics.attention,
            logit_chunk=self.logit_chunk,
        )

    def load(
        self,
        path: str | Path,
        numerics: Numerics,
        text: TextConfig | None,
        *,
        head: Head = "lm",
        frozen: bool = False,
        num_ids: int | None = None,
        label: str | None = None,
    ) -> tuple[Model, Params]:
        """Loads a model onto the mesh and checks that it has enough positions for the text's prompts and responses.

        Args:
          text: None for a reward model with a tokenizer of its own, whose rows are cut to its positions.
          num_ids, label: as for `loading.load`, of models from elsewhere.
        """
        return loading.load(
            path, self.options(numerics), self.mesh, text=text, head=head, frozen=frozen, num_ids=num_ids, label=label
        )

    def load_to_train(
        self,
        stage: str,
        path: str | Path,
        numerics: Numerics,
        text: TextConfig,
        *,
        adapter: AdapterConfig | None,
        seed: int,
        head: Head = "lm",
        new_head: bool = False,
        num_ids: int | None = None,
    ) -> tuple[Model, Params]:
        """A model that trains: float32 master parameters, or frozen ones with fresh adapters.

        Args:
          new_head: whether a language model gets a value head of zeros.
          num_ids: as for `loading.load`, of models from elsewhere.
        """
        model, params = self.load(path, numerics, text, head=head, frozen=adapter is not None, num_ids=num_ids)
        key = stage_key(seed, f"{stage} adapter")
        model, params = loading.to_train(model, params, adapter, self.mesh, key, new_head=new_head)
        if adapter is not None:
            trained, rest = (
                sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in ("trainable", "frozen")
            )
            console.print(
                f"  {stage}: adapters of rank {adapter.rank} train {trained:,} parameters, {rest:,} are frozen"
            )
        return model, params

    def load_base(
        self,
        stage: str,
        numerics: Numerics,
        codec: TextCodec,
        architecture: ArchitectureConfig | None,
        seed: int,
        *,
        adapter: AdapterConfig | None = None,
        new_head: bool = False,
    ) -> tuple[Model, Params]:
        """The model that training starts from: the base model, or freshly initialised parameters of `architecture`.

        Args:
          new_head: as for `load_to_train`.
        """
        base, options = self.inputs.base, self.options(numerics)
        if base is None:
            assert architecture is not None
            decoder = loading.scratch_sizes(architecture, codec.vocab_size)
            loading.check_positions(decoder, codec.config)
            model, params = options.model(decoder, self.mesh), loading.init(decoder, self.mesh, stage_key(seed, "init"))
            return model, loading.with_value_head(model, params, self.mesh) if new_head else params
        return self.load_to_train(
            stage, base, numerics, codec.config, adapter=adapter, seed=seed, new_head=new_head, num_ids=codec.vocab_size
        )

    def tokenize(
        self, codec: TextCodec, rows: Sequence[Row], *, of: str | None = None
    ) -> tuple[list[Example], TokenReport]:
        """Tokenizes rows (prompt, responses), or reads their ids from the cache.

        Args:
          of: what the rows are, a plural, to say how many are cut; None: it is not said.
        """
        examples, report = tokenize(codec, rows, cache=self.token_cache)
        if of is not None:
            prompts, responses = counted(report.truncated_prompts, "prompt"), counted(report.truncated_responses, "row")
            console.print(f"  {len(rows)} {of}: {prompts} cut to fit, a response cut in {responses}", soft_wrap=True)
        return examples, report

    def sample(
        self,
        name: str,
        model: Model,
        params: Params,
        examples: Sequence[Example],
        codec: TextCodec,
        *,
        sampling: Sampling,
        key: jax.Array,
        batch_size: int,
        source: Path,
    ) -> Samples:
        """Samples responses to every prompt, with progress logged under the stage's name; goes on after a kill.

        Args:
          source: path of the model, for messages.
        """
        if self.upcoming is not None:
            self.upcoming.announce(model, codec.config.length_buckets)
        of: dict[str, Any] = {"sampling": dataclasses.asdict(sampling), "batch_size": batch_size}
        if len(codec.end_ids) > 1:
            of["ends"] = list(codec.end_ids)
        with self.running(name, "samples", examples, of, every=batch_size, log=True) as (keep, progress):
            return sample_examples(
                model,
                params,
                examples,
                codec,
                sampling=sampling,
                key=key,
                batch_size=batch_size,
                mesh=self.mesh,
                name=str(source),
                keep=keep,
                progress=progress,
            )

    def score(
        self,
        stage: str,
        name: str,
        model: Model,
        params: Params,
        examples: Sequence[Example],
        *,
        head: Head,
        batch_size: int,
        length_buckets: int,
        source: str,
        packing: Packing | None = None,
        of: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """`score_examples` with progress on the terminal; goes on after a kill.

        Args:
          name: name of the pass, one of its own in the stage.
          source: path of the model, for messages.
          of: see `running`.
        """
        layout = {"length_buckets": length_buckets} if packing is None else {"packing": dataclasses.asdict(packing)}
        of = {"batch_size": batch_size, **layout, **(of or {})}
        with self.running(stage, name, examples, of) as (keep, progress):
            return score_examples(
                model, params, examples, head=head, batch_size=batch_size, length_buckets=length_buckets,
                mesh=self.mesh, packing=packing, name=source, keep=keep, progress=progress,
            )  # fmt: skip

    @contextlib.contextmanager
    def running(
        self,
        stage: str,
        name: str,
        examples: Sequence[Example],
        of: Mapping[str, Any],
        *,
        every: int = 1,
        log: bool = False,
    ) -> Iterator[tuple[Pass, Progress]]:
        """A pass over examples: what keeps its results, and its progress on the terminal.

        Args:
          name: name of the pass, one of its own in the stage.
          of: what the results depend on besides the examples and the stage's recipe. Results of another `of` are not
            used.
          every: number of rows between two reports of progress.
          log: also write progress to the stage's metrics.jsonl.
        """
        recipe = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()
        identity = {
            "pass": name, "rows": len(examples), "examples": digest(examples), "recipe": recipe,
            "parents": dict(self.parents), **of,
        }  # fmt: skip
        folder = self.folder / parts.FOLDER / name.replace(" ", "-")
        found = parts.Parts(folder, identity, minutes=self.save_minutes, send=self.send_parts)
        with Pass(f"{stage}'s {name}", len(examples), found, every=every) as keep:
            if keep.done:
                console.print(f"  {keep.name}: {keep.done} of {keep.total} rows are there", soft_wrap=True)
            tracker = Tracker(
                self.folder if log else None, stage if log else f"{stage} {name}", keep.total, tensorboard=False,
                start_step=keep.reported, whole=log, bursts=True,
            )  # fmt: skip
            with contextlib.closing(tracker):
                yield keep, partial(tracker.update, log=True)

    @property
    def checkpointing(self) -> Checkpointing:
        """Where and how often `fit` saves checkpoints."""
        return Checkpointing(
            self.checkpoints or self.folder / "checkpoints",
            every=self.watch.checkpoint_every,
            keep=self.watch.keep_checkpoints,
            recipe=self.recipe,
            before_save=self.before_save,
        )
