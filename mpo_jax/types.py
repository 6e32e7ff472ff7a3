"""Pytrees passed between layers. Letters: B batch, N side or sample, T token, P prompt, S response token."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Head = Literal["lm", "value"]
"""The head on a model's trunk: next-token logits, or one value per token (a reward model, a critic)."""

Tree: TypeAlias = dict[str, Any]
"""Nested plain dicts of arrays: all or part of a model's parameters."""

Params: TypeAlias = dict[str, Tree]
"""A model's parameters as {"trainable": tree, "frozen": tree}.

Only the trainable part has gradients, optimiser moments, checkpoints and averages. Under full training the frozen part
is empty; in a model that only scores, the trainable part is empty. Models may share one frozen tree.
"""


def trainable(tree: Tree) -> Params:
    """Parameters with every leaf trainable."""
    return {"trainable": tree, "frozen": {}}


def frozen(tree: Tree) -> Params:
    """Parameters with every leaf frozen."""
    return {"trainable": {}, "frozen": tree}


def merge(params: Params) -> Tree:
    """Merges both parts into the single tree that a forward pass reads.

    Raises:
      ValueError: if a leaf is in both parts.
    """
    return _merged(params["trainable"], params["frozen"], "")


def _merged(a: Tree, b: Tree, path: str) -> Tree:
    both = {**a, **b}
    for name in a.keys() & b.keys():
        here = f"{path}.{name}".lstrip(".")
        if not (isinstance(a[name], dict) and isinstance(b[name], dict)):
            raise ValueError(f"{here} is both trainable and frozen")
        both[name] = _merged(a[name], b[name], here)
    return both


Metrics: TypeAlias = dict[str, Any]
"""`Mean`s, `Skips` or whole-batch scalars, by logged name."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean kept as a sum and a count, so parts of a batch add up to the mean of the whole batch."""

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, x: Array, mask: Array | None = None) -> "Mean":
        """Sum and count of the elements of `x` that `mask` (bool, same shape) keeps; of all elements without a mask."""
        if mask is None:
            return cls(x.astype(jnp.float32).sum(), jnp.asarray(x.size, jnp.float32))
        return cls(jnp.where(mask, x, 0).astype(jnp.float32).sum(), mask.astype(jnp.float32).sum())

    @property
    def value(self) -> Array:
        """total / count; 0 if the count is 0."""
        return self.total / jnp.maximum(self.count, 1.0)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Running mean and variance of a stream of numbers.

    Attributes:
      count: [] number of values.
      mean: [] their mean.
      m2: [] sum of their squared deviations from the mean.
    """

    count: Float[Array, ""]
    mean: Float[Array, ""]
    m2: Float[Array, ""]

    @property
    def std(self) -> Array:
        """Unbiased standard deviation; 0 for fewer than two numbers."""
        return jnp.sqrt(self.m2 / jnp.maximum(self.count - 1.0, 1.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skips:
    """Updates skipped because a loss or gradient was not finite.

    Attributes:
      count: [] int32, number of skipped updates.
      in_a_row: [] int32, length of the run of skips that ends with the last update, earlier updates included.
    """

    count: Int[Array, ""]
    in_a_row: Int[Array, ""]

    def __add__(self, later: "Skips") -> "Skips":
        return Skips(self.count + later.count, later.in_a_row)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts with N responses each, as ids and lengths, on the host or on the devices.

    Attributes:
      prompt: [B P] ids, right-padded.
      prompt_len: [B] number of real prompt tokens; 0 marks a padding row.
      response: [B N S] ids, right-padded.
      response_len: [B N] number of real response tokens, EOS included.
      key: [B] uint32, fingerprint of the prompt, folded into the random key of the row.
    """

    prompt: Int[Array, "B P"] | np.ndarray
    prompt_len: Int[Array, " B"] | np.ndarray
    response: Int[Array, "B N S"] | np.ndarray
    response_len: Int[Array, "B N"] | np.ndarray
    key: Int[Array, " B"] | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """One layout for plain, padded and prompt-shared rows; every array is [B T], and index t refers to token t.

    Attributes:
      ids: token ids.
      position: rotary position; every branch continues the positions of the prompt.
      segment: segment number, 0 for padding; a token attends only to its own segment.
      branch: 0 for the prompt, 1, 2, ... for its responses; a token attends to branch 0 and to its own branch.
      loss_mask: True at response tokens (EOS included).
      scored_from: first column that may have a True loss mask (static; lets the head skip the prompt).
      num_responses: number of equal blocks that the columns from `scored_from` on form; a block does not attend to
        another (static).
      packed: whether a row holds several prompts, at columns that only the arrays tell (static).
    """

    ids: Int[Array, "B T"]
    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    branch: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    scored_from: int = dataclasses.field(default=0, metadata={"static": True})
    num_responses: int = dataclasses.field(default=1, metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """One micro-batch of a packed batch of B prompts with N responses each.

    Attributes:
      tokens: [R T]; a token's segment is one more than its prompt's place in the batch.
      valid: [B] True at the prompts in this micro-batch. Results for the others are 0 and must not count.
      response_len: [B N] number of real response tokens, EOS included, of the whole batch.
    """

    tokens: Tokens
    valid: Bool[Array, " B"]
    response_len: Int[Array, "B N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch of B prompts with N responses each in micro-batches of one shape [R T], on the host or on the devices.

    A prompt and its responses are neighbours in one row. Arrays [M R T] are as in `Tokens`.

    Attributes:
      ids, position, branch: of each token.
      segment: one more than the prompt's place in the batch; 0 for padding.
      count: [] number of micro-batches that hold tokens. They come first; M is how many a batch can need.
      micro: [B] the micro-batch that each prompt is in; -1 marks a padding row.
      prompt_len: [B] number of real prompt tokens; 0 marks a padding row.
      response_len: [B N] number of real response tokens, EOS included.
    """

    ids: Int[Array, "M R T"] | np.ndarray
    position: Int[Array, "M R T"] | np.ndarray
    segment: Int[Array, "M R T"] | np.ndarray
    branch: Int[Array, "M R T"] | np.ndarray
    count: Int[Array, ""] | np.ndarray
    micro: Int[Array, " B"] | np.ndarray
    prompt_len: Int[Array, " B"] | np.ndarray
    response_len: Int[Array, "B N"] | np.ndarray

    def rows(self, m: Int[Array, ""]) -> PackedRows:
        """Micro-batch m."""
        ids, position, segment, branch = (
            jax.lax.dynamic_index_in_dim(x, m, keepdims=False)
            for x in (self.ids, self.position, self.segment, self.branch)
        )
        tokens = Tokens(ids, position, segment, branch, branch > 0, packed=True)
        return PackedRows(tokens, self.micro == m, jnp.asarray(self.response_len))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampled responses with everything PPO's update needs; token arrays are [B S] over response tokens.

    Attributes:
      joined: prompts with the sampled responses (N = 1).
      mask: [B S] True at real response tokens.
      behavior_logp: log-probability in nats under the sampling policy, from the training forward pass.
      ref_logp: log-probability in nats under the KL reference.
      value: critic's value of the state before each token; the column after the last token, if it exists, holds the
        value of the final state.
      score: [B] raw reward-model score of the whole response.
      has_eos: [B] True if the response ended with EOS.
    """

    joined: PromptBatch
    mask: Bool[Array, "B S"]
    behavior_logp: Float[Array, "B S"]
    ref_logp: Float[Array, "B S"]
    value: Float[Array, "B S"]
    score: Float[Array, " B"]
    has_eos: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoBatch:
    """A rollout with advantages and returns [B S]; an input of the update, so it receives no gradient.

    Attributes:
      packed: the rollout's prompts and responses as the models read them; None: as they are, padded.
    """

    rollout: Rollout
    advantage: Float[Array, "B S"]
    returns: Float[Array, "B S"]
    packed: "Packed | PackedRows | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Training state of one model.

    Attributes:
      step: [] int32, number of updates applied; skipped updates do not count.
      trainable: float32 master parameters of the trainable part.
      opt_state: optax state, sharded like the parameters.
      skipped: [] int32, number of updates skipped because a loss or gradient was not finite.
      skipped_in_a_row: [] int32, number of updates skipped since the last one applied.
    """

    step: Int[Array, ""]
    trainable: Tree
    opt_state: Any
    skipped: Int[Array, ""] = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    skipped_in_a_row: Int[Array, ""] = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))


REMOVED = "removed"
"""Key of a manifest that names the folders (`model`, `critic`) that runtime.keep=last removed."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The folder of a finished stage and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """`<stage>-<hash>`, the folder's name."""
        return self.path.name

    @property
    def model(self) -> Path:
        """Hugging Face folder of the stage's model."""
        return self.path / "model"
