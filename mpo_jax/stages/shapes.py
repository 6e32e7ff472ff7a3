"""Shapes and shardings of the arguments of every stage program, so that programs compile without arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpo_jax.config.schema import OptimConfig, TextConfig
from mpo_jax.data.lengths import Lengths
from mpo_jax.data.packing import Packing
from mpo_jax.models import flops, forward, loading
from mpo_jax.models.flops import Rows, Work
from mpo_jax.models.forward import Model
from mpo_jax.runtime.sharding import batch_sharding, batch_shardings, num_groups, replicated
from mpo_jax.stages.packed import planned_packing
from mpo_jax.stages.settings import NOT_WATCHED, TrainSettings, Watch
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import state_sharding
from mpo_jax.types import Head, Packed, Params, PromptBatch, TrainState, Tree, frozen, trainable

MULTIPLE = 8
"""Batch widths are rounded up to a multiple of this (see data.batches)."""


PACKED_SHARE = 0.9
"""Share of packed columns that hold tokens, for estimates: tests/benchmarks/RESULTS.md has measured ones."""


Set = Literal["demonstrations", "pairs", "prompts", "test_prompts"]
"""Sets of rows whose lengths are sampled."""


@dataclasses.dataclass(frozen=True)
class Amounts:
    """Numbers of rows, which determine how often programs run, and lengths, which determine how long a call takes.

    Attributes:
      lengths: of each set; a set that is missing is counted at full width.
      reward_watched: held-out pairs that the reward model is evaluated on during training.
      reward_test: held-out pairs that it is evaluated on afterwards.
    """

    demonstrations: int
    reward_pairs: int
    reward_watched: int
    reward_test: int
    held_out: int
    prompts: int
    human_pairs: int
    selected: int
    test_prompts: int
    lengths: Mapping[Set, Lengths] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TextRewards:
    """Scores that are computed from text.

    Attributes:
      model: a reward model with a tokenizer of its own; None: a Python function, which compiles nothing.
      max_tokens: of a row in its own tokens.
    """

    model: Model | None = None
    max_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Argument shapes of the programs for one model on one mesh, and the row counts that set how often they run.

    Attributes:
      text: length limits of prompts and responses; rows are padded to them.
      frozen_dtype: storage type of models that do not train.
      amounts: numbers of rows; None if no data was read.
      parents: roles of the artifacts that the stage reads.
      watch: how often a training stage is evaluated on held-out rows.
      prompt, response: widths of the batches; None: the text's limits.
      packing: shape of the training rows where they are packed; None: the largest that these widths allow.
      eos_id: id or ids that end a sample; None: any, since it changes neither memory nor work.
      text_rewards: what scores responses as text; None: a reward model of the policy's tokens and sizes.
      own_reference: whether PPO's reference is another artifact than the one that the actor starts from.
      offload_frozen, offload_moments: what PPO keeps in host memory between the phases that use it.
    """

    model: Model
    mesh: Mesh
    text: TextConfig
    frozen_dtype: str
    amounts: Amounts | None = None
    watch: Watch = NOT_WATCHED
    prompt: int | None = None
    response: int | None = None
    packing: Packing | None = None
    eos_id: int | tuple[int, ...] | None = None
    offload_frozen: bool = False
    offload_moments: bool = False
    own_reference: bool = False
    text_rewards: TextRewards | None = None
    parents: frozenset[str] = frozenset({"init", "reference", "pairs", "reward"})

    @property
    def shards(self) -> int:
        """Number of device groups that a batch is divided over."""
        return num_groups(self.mesh)

    def tree(self, head: Head = "lm") -> Tree:
        """All parameters in float32."""
        shapes = forward.abstract_params(self.model.decoder, head=head)
        return shaped(shapes, forward.param_shardings(shapes, self.mesh))

    def trained(self, head: Head = "lm") -> Params:
        """A model that trains: float32 master parameters, or adapters and the frozen rest."""
        split = forward.abstract_split(self.model, head=head)
        masters = shaped(split["trainable"], forward.param_shardings(split["trainable"], self.mesh))
        if self.model.adapter is None:
            return trainable(masters)
        held = self.frozen(head)["frozen"]
        return {"trainable": masters, "frozen": {name: held[name] for name in split["frozen"]}}

    def frozen(self, head: Head = "lm") -> Params:
        """Parameters of a model that does not train, as `weights.load_params` stores them."""
        shapes = jax.eval_shape(lambda tree: loading.stored(tree, self.frozen_dtype, self.model.dtype), self.tree(head))
        return frozen(shaped(shapes, forward.param_shardings(shapes, self.mesh)))

    @property
    def text_reward_model(self) -> Params:
        """The parameters of a reward model with a tokenizer of its own; none if there is none."""
        found = self.text_rewards
        if found is None or found.model is None:
            return frozen({})
        return dataclasses.replace(self, model=found.model).frozen("value")

    def state(self, optim: OptimConfig, head: Head = "lm") -> TrainState:
        """The training state of a model."""
        optimizer = make_optimizer(optim)

        def init(tree: Tree) -> TrainState:
            return TrainState(jnp.zeros((), jnp.int32), tree, optimizer.init(tree))

        tree = self.trained(head)["trainable"]
        return shaped(jax.eval_shape(init, tree), state_sharding(tree, optimizer, self.mesh))

    def between(self, state: TrainState) -> TrainState:
        """What a model that trains keeps on the devices between its updates."""
        return dataclasses.replace(state, opt_state=()) if self.offload_moments else state

    def rows(self, count: int, num_responses: int) -> Rows:
        """A batch padded to its widths."""
        up = lambda n: -(-n // MULTIPLE) * MULTIPLE  # noqa: E731
        prompt, response = self.prompt or self.text.max_prompt_tokens, self.response or self.text.max_response_tokens
        return Rows(count, up(prompt), num_responses, up(response))

    def lengths(self, of: Set) -> Lengths | None:
        """Lengths of a set of rows; None if they are unknown."""
        return None if self.amounts is None else self.amounts.lengths.get(of)

    def sampled(self, of: Set, num_samples: int = 1) -> Lengths | None:
        """Lengths of a set's prompts with sampled responses, assumed to be as long as the demonstrations' are."""
        prompts, written = self.lengths(of), self.lengths("demonstrations")
        return None if prompts is None or written is None else prompts.answered(written.response, num_samples)

    def mean(
        self, lengths: Lengths | None, rows: Rows, work: Callable[[Rows], Work], *, packed: bool = False
    ) -> Work | None:
        """Mean work of a call whose batches have the widths of these lengths; None if they are unknown.

        Packed rows have no widths: the work is that of their tokens and of the columns that stay empty.
        """
        if lengths is None:
            return None
        if packed:
            total = Work(0.0)
            for prompt, response in zip(lengths.prompt, lengths.response, strict=True):
                total += work(dataclasses.replace(rows, prompt=int(prompt), response=round(response.mean())))
            return total.times(1 / (PACKED_SHARE * len(lengths.prompt)))
        total = Work(0.0)
        for widths, share in lengths.widths(self.text.length_buckets):
            padded = dataclasses.replace(rows, prompt=widths.prompt, response=widths.response)
            total += work(padded).times(share)
        return total

    def array(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An array with the batch as its leading axis."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def batch(self, rows: Rows) -> PromptBatch:
        """Prompts with responses."""
        B, N = rows.count, rows.num_responses
        return PromptBatch(
            prompt=self.array(B, rows.prompt),
            prompt_len=self.array(B),
            response=self.array(B, N, rows.response),
            response_len=self.array(B, N),
            key=self.array(B, dtype=jnp.uint32),
        )

    def packed(self, rows: Rows, train: TrainSettings) -> Packed:
        """Prompts with responses, packed as a training stage packs them."""
        packing, B = self.packing or planned_packing(rows, train, self.mesh), rows.count
        shape = (packing.most(B), packing.rows, packing.columns)
        tokens, count = (jax.ShapeDtypeStruct(x, jnp.int32) for x in (shape, ()))
        micro, lengths = (jax.ShapeDtypeStruct(x, jnp.int32) for x in ((B,), (B, rows.num_responses)))
        whole = Packed(tokens, tokens, tokens, tokens, count, micro, micro, lengths)  # type: ignore[arg-type]
        return shaped(whole, batch_shardings(whole, self.mesh))

    def prompts(self, rows: Rows) -> PromptBatch:
        """Prompts to sample from, as they are collated: with no responses, of the narrowest width."""
        return self.batch(dataclasses.replace(rows, num_responses=0, response=MULTIPLE))

    def number(self) -> Any:
        """A float32 scalar, replicated on every device."""
        return jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh))

    def allowed(self) -> Any:
        """[V] bool: the ids that may be sampled."""
        return jax.ShapeDtypeStruct((self.model.decoder.vocab_size,), jnp.bool_, sharding=replicated(self.mesh))

    def key(self) -> Any:
        """A PRNG key."""
        return shaped(jax.eval_shape(lambda: jax.random.key(0)), replicated(self.mesh))

    def decoding(self, rows: Rows) -> Work:
        """The work of decoding all response tokens of a batch."""
        size = jnp.dtype(self.model.dtype).itemsize
        return flops.decode(self.model.decoder, rows, shards=self.shards, bytes_each=size)


def shaped(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and types with the given shardings: a tree of the same structure, or one for all leaves."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
