"""What a stage is given besides its settings: where it runs, what it reads by content, and who watches."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mpo_jax.config.schema import ArchitectureConfig, Config, TextConfig
from mpo_jax.data import corpus
from mpo_jax.data.corpus import Corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, Row, TokenReport, tokenize
from mpo_jax.evaluation.sampling import sample_examples
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime.offload import Offload
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.stages.settings import NOT_WATCHED, Numerics, Watch
from mpo_jax.training.loop import Checkpointing
from mpo_jax.training.refill import Samples
from mpo_jax.training.tracker import Sink, Tracker
from mpo_jax.types import Head, Params

NO_OFFLOAD = Offload(frozen=False, moments=False)
INPUTS = frozenset({"data", "base", "reward_model"})
"""What stages read that is no artifact: the rows, the base model's files, and those of a finished reward model."""


class Inputs:
    """What is read by content, each with the fingerprint that enters the names of the stages that read it.

    Args:
      reads: those that may be read; the others raise AssertionError.
    """

    def __init__(self, config: Config, reads: Collection[str] = INPUTS):
        # the sections that name inputs, and what turns their rows into prompts
        self._config = config.model_copy(update={"workdir": "", "seed": 0})
        self._reads = frozenset(reads)
        self._fingerprints: dict[str, Any] = {}

    def only(self, reads: Collection[str]) -> "Inputs":
        """The same inputs for a stage that reads no others."""
        narrowed = Inputs(self._config, reads)
        narrowed._fingerprints = self._fingerprints
        return narrowed

    @property
    def fingerprints(self) -> dict[str, str]:
        """By input: a hash of its content, whatever it is called and wherever it lies; absent inputs have none."""
        config = self._config
        found: dict[str, Callable[[], str]] = {"data": lambda: corpus.fingerprint(config.data)}
        if config.model.path is not None:
            found["base"] = partial(corpus.fingerprint_model, config.model.path)
        if config.reward.path is not None:
            found["reward_model"] = partial(corpus.fingerprint_model, config.reward.path)
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
        """The true utility of (prompt, response), where the data's world knows it."""
        self._check("data")
        return corpus.known_utility(self._config.data)

    @property
    def samples_once(self) -> bool:
        """Whether each distinct prompt is sampled once, whatever the number of its rows."""
        self._check("data")
        return self._config.data.prompts == "unique"

    @property
    def is_toy(self) -> bool:
        """Whether the rows are of the embedded toy world."""
        self._check("data")
        return self._config.data.kind == "toy"

    @property
    def base(self) -> str | None:
        """The base model; None where it is trained from scratch."""
        self._check("base")
        return self._config.model.path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, or the toy world's."""
        self._check("base")
        return corpus.base_tokenizer(self._config)

    @property
    def reward_model(self) -> str | None:
        """A finished reward model that takes the place of a trained one."""
        self._check("reward_model")
        return self._config.reward.path

    def _check(self, name: str) -> None:
        assert name in self._reads, f"the stage reads {name}, which its name does not hash: declare it in Stage.inputs"


@dataclasses.dataclass(frozen=True)
class Context:
    """Where and how a stage runs. Nothing here changes a result beyond rounding, except the inputs' content.

    Attributes:
      folder: where the stage is made.
      watch: of a stage that trains.
      remat: what the backward pass computes again.
      logit_chunk: tokens a device whose logits exist at one time.
      token_cache: folder of tokenized rows; None: none.
      checkpoints: where the training state is saved; None: `folder/checkpoints`.
      before_save: called before every checkpoint, in every process.
      recipe: what the stage is made from, kept beside its checkpoints.
      sinks: makes further places for logged metrics.
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
    sinks: Callable[[], Sequence[Sink]] = tuple

    def options(self, numerics: Numerics) -> loading.Options:
        """How models are loaded and run."""
        return loading.Options(
            dtype=numerics.compute_dtype,
            frozen_dtype=numerics.frozen_dtype,
            remat=self.remat,
            attention=numerics.attention,
            logit_chunk=self.logit_chunk,
        )

    def load(
        self, path: str | Path, numerics: Numerics, text: TextConfig, *, head: Head = "lm", frozen: bool = False
    ) -> tuple[Model, Params]:
        """A model on the mesh, with room for the text's prompts and responses."""
        return loading.load(path, self.options(numerics), self.mesh, text=text, head=head, frozen=frozen)

    def load_base(
        self,
        numerics: Numerics,
        codec: TextCodec,
        architecture: ArchitectureConfig | None,
        seed: int,
    ) -> tuple[Model, Params]:
        """The model that everything starts from: the base model, or fresh parameters of these sizes."""
        base, options = self.inputs.base, self.options(numerics)
        if base is None:
            assert architecture is not None
            decoder = loading.scratch_sizes(architecture, codec.vocab_size)
            loading.check_positions(decoder, codec.config)
            return options.model(decoder, self.mesh), loading.init(decoder, self.mesh, stage_key(seed, "init"))
        loading.check_vocabulary(codec.vocab_size, loading.open_model(base).decoder, base)
        return self.load(base, numerics, codec.config)

    def tokenize(self, codec: TextCodec, rows: Sequence[Row]) -> tuple[list[Example], TokenReport]:
        """Rows (prompt, responses) as ids, from the cache where they are there."""
        return tokenize(codec, rows, cache=self.token_cache)

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
        """Samples of every prompt, with progress under the stage's name.

        Args:
          source: the model's place, for messages.
        """
        with contextlib.closing(Tracker(self.folder, name, len(examples), tensorboard=False)) as tracker:
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
                progress=partial(tracker.update, log=True),
            )

    @property
    def checkpointing(self) -> Checkpointing:
        """Where and how often `fit` saves."""
        return Checkpointing(
            self.checkpoints or self.folder / "checkpoints",
            every=self.watch.checkpoint_every,
            keep=self.watch.keep_checkpoints,
            recipe=self.recipe,
            before_save=self.before_save,
        )
