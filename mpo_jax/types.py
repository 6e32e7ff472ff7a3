"""Pytrees that travel between layers. Letters: B batch, N side or sample, T token, P prompt, S response token."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Head = Literal["lm", "value"]
"""What a model has on its trunk: next-token logits, or one value a token (a reward model, a critic)."""

Tree: TypeAlias = dict[str, Any]
"""Nested plain dicts of arrays: all of a model's parameters, or a part of them."""

Params: TypeAlias = dict[str, Tree]
"""A model's parameters as {"trainable": tree, "frozen": tree}.

Gradients, optimiser moments, checkpoints and averages exist for the trainable part alone. Full training has an empty
frozen part, a model that only scores an empty trainable one. Models may share one frozen tree.
"""


def trainable(tree: Tree) -> Params:
    """Parameters that all train."""
    return {"trainable": tree, "frozen": {}}


def frozen(tree: Tree) -> Params:
    """Parameters of which none trains."""
    return {"trainable": {}, "frozen": tree}


def merge(params: Params) -> Tree:
    """Both parts as the one tree that a forward pass reads.

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
"""Means, Skips, or scalars of the whole batch, by the name under which they are logged."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean kept as a sum and a count, so that parts of a batch add up to exactly the whole batch's mean."""

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, x: Array, mask: Array | None = None) -> "Mean":
        """Sum and count of the elements of `x` that `mask` (bool, same shape) keeps; all of them without a mask."""
        if mask is None:
            return cls(x.astype(jnp.float32).sum(), jnp.asarray(x.size, jnp.float32))
        return cls(jnp.where(mask, x, 0).astype(jnp.float32).sum(), mask.astype(jnp.float32).sum())

    @property
    def value(self) -> Array:
        """total / count, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Running mean and spread of a stream of numbers.

    Attributes:
      count: [] how many numbers.
      mean: [] their mean.
      m2: [] the sum of their squared differences from the mean.
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
    """Updates left out because a loss or a gradient was not finite.

    Attributes:
      count: [] int32, how many of these.
      in_a_row: [] int32, how many up to and with the last of these, earlier ones included.
    """

    count: Int[Array, ""]
    in_a_row: Int[Array, ""]

    def __add__(self, later: "Skips") -> "Skips":
        return Skips(self.count + later.count, later.in_a_row)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts with N responses each, as ids with lengths; what batches are made of, on the host and on the device.

    Attributes:
      prompt: [B P] ids, right-padded.
      prompt_len: [B] number of real prompt tokens; 0 marks a row that only fills the batch.
      response: [B N S] ids, right-padded.
      response_len: [B N] number of real response tokens, EOS included.
      key: [B] uint32, the prompt's fingerprint: what its random numbers are folded from.
    """

    prompt: Int[Array, "B P"] | np.ndarray
    prompt_len: Int[Array, " B"] | np.ndarray
    response: Int[Array, "B N S"] | np.ndarray
    response_len: Int[Array, "B N"] | np.ndarray
    key: Int[Array, " B"] | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """One layout for plain, padded and prompt-shared rows; every field [B T] and about the token at its own index.

    Attributes:
      ids: token ids.
      position: rotary position; every branch continues the prompt's positions.
      segment: 0 is padding; tokens see only tokens of their own segment.
      branch: 0 is the prompt, 1, 2, ... its responses; a token sees branch 0 and its own branch.
      loss_mask: True at response tokens (EOS included).
      scored_from: no column before this one has a True loss mask (static; lets the head skip the prompt).
      num_responses: the columns from there on are this many equal stretches, none of which sees another (static).
    """

    ids: Int[Array, "B T"]
    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    branch: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    scored_from: int = dataclasses.field(default=0, metadata={"static": True})
    num_responses: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampled responses with all that PPO's update needs; token arrays are [B S] over response tokens.

    Attributes:
      joined: the prompts and the sampled responses (N = 1).
      mask: [B S] True at real response tokens.
      behavior_logp: log-probability in nats under the policy that sampled, by the training forward pass.
      ref_logp: the same under the KL reference.
      value: the critic's value of the state before each token, and at the column behind the last token, where there
        is one, of the state after it.
      score: [B] raw reward-model score of the whole response.
      has_eos: [B] True where the response ended by itself.
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
    """A rollout with advantages and returns [B S]; an input of the update, so no gradient flows into it."""

    rollout: Rollout
    advantage: Float[Array, "B S"]
    returns: Float[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one model's optimisation carries from step to step.

    Attributes:
      step: [] int32, updates made; a skipped update is not counted.
      trainable: float32 master parameters of the trainable part.
      opt_state: the optax state, sharded like the parameters it belongs to.
      skipped: [] int32, updates left out because a loss or gradient was not finite.
      skipped_in_a_row: [] int32, those since the last update made.
    """

    step: Int[Array, ""]
    trainable: Tree
    opt_state: Any
    skipped: Int[Array, ""] = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    skipped_in_a_row: Int[Array, ""] = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished stage's folder and the manifest in it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """`<stage>-<hash>`, the folder's name."""
        return self.path.name

    @property
    def model(self) -> Path:
        """The stage's model as a Hugging Face folder."""
        return self.path / "model"
