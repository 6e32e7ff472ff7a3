"""What gives responses their scores: a reward model of the policy's tokens or its own, or a Python function.

The first reads the ids that the policy wrote. The other two read text: ids are decoded by the policy's tokenizer, and
a score depends on its own prompt and response alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from transformers import PreTrainedTokenizerBase

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.batches import Widths, collate
from mpo_jax.data.chat import Chat
from mpo_jax.data.reward_codec import RewardCodec
from mpo_jax.data.text import TextCodec
from mpo_jax.data.text_rows import TextReader
from mpo_jax.data.tokens import Example
from mpo_jax.evaluation.reward_function import RewardFunction
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.console import console
from mpo_jax.runtime.offload import to_devices
from mpo_jax.runtime.sharding import batch_sharding, place_batch
from mpo_jax.stages.context import Context
from mpo_jax.stages.settings import Numerics
from mpo_jax.stages.shapes import MULTIPLE
from mpo_jax.stages.widths import few_widths
from mpo_jax.types import Artifact, Mean, Metrics, Params, PromptBatch


@dataclasses.dataclass(frozen=True)
class SharedTokens:
    """A reward model of the policy's tokens: it reads the very ids.

    Attributes:
      source: path of the model, for messages.
    """

    context: Context
    model: Model
    params: Params
    text: TextConfig
    source: str

    def scores(
        self,
        stage: str,
        name: str,
        prompts: Sequence[str],
        examples: Sequence[Example],
        *,
        batch_size: int,
        of: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """[E N] float32: the raw score of each response; a pass that goes on after a kill.

        Args:
          stage, name, of: as for `Context.score`.
          prompts: [E] prompts of the corpus.
          examples: the same in the policy's tokens, with their responses.
          batch_size: prompts at a time.
        """
        return self.context.score(
            stage, name, self.model, self.params, examples, head="value", batch_size=batch_size,
            length_buckets=self.text.length_buckets, source=self.source, of=of,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OwnTokens:
    """A reward model with a tokenizer of its own, to which texts are given in its tokens.

    Attributes:
      codec: the reward model's.
      reader: the policy's.
    """

    context: Context
    model: Model
    params: Params
    text: TextConfig
    source: str
    codec: RewardCodec
    reader: TextReader

    def scores(
        self,
        stage: str,
        name: str,
        prompts: Sequence[str],
        examples: Sequence[Example],
        *,
        batch_size: int,
        of: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """As `SharedTokens.scores`; each response is a row with a copy of its prompt."""
        rows = self.reader.rows(prompts, examples)
        each = len(rows) // len(examples)
        own, cut = self.codec.examples(rows)
        if cut:
            console.print(
                f"  {cut} of {len(rows)} rows are longer than {self.codec.max_tokens} tokens of {self.source}, and "
                "lose the start of their prompt",
                soft_wrap=True,
                markup=False,
            )
        scores = self.context.score(
            stage, name, self.model, self.params, own, head="value", batch_size=batch_size * each,
            length_buckets=self.text.length_buckets, source=self.source, of=of,
        )  # fmt: skip
        return scores.reshape(len(examples), each)

    def batch(self, prompts: Sequence[str | None], joined: PromptBatch) -> tuple[Float[Array, " B"], Metrics]:
        """The raw scores of a batch of samples, and what is measured on the way: the share of rows that were cut.

        The scores are sharded as the batch; the host does not wait for them.

        Args:
          prompts: [B] prompts of the corpus; None for padding rows, whose score means nothing.
          joined: their samples (N = 1), for which the host waits.
        """
        real, rows = self.reader.batch(prompts, joined)
        own, cut = self.codec.examples(rows)
        left, padding = iter(own), Example([], [[]])
        whole = [next(left) if is_real else padding for is_real in real]
        longest = max(len(example.prompt) for example in whole)
        width = next(width for width in few_widths(self.codec.max_tokens) if width >= longest)
        batch = collate(whole, Widths(-(-width // MULTIPLE) * MULTIPLE, MULTIPLE), num_responses=1)
        mesh = self.context.mesh
        score, params = forward.make_score_pairs(self.model, mesh), to_devices(self.params)
        scores = score(params, place_batch(batch, mesh))
        measured = Mean(jnp.float32(cut), jnp.float32(len(rows)))
        return _make_first(mesh)(scores), {"objective/cut_rows": measured}


@lru_cache
def _make_first(mesh: Mesh) -> Any:
    """The jitted [B 1] -> [B], sharded as a batch."""

    def first(scores_BN: Array) -> Array:
        return scores_BN[:, 0]

    return jax.jit(first, out_shardings=batch_sharding(mesh))


@dataclasses.dataclass(frozen=True)
class ByFunction:
    """A Python function of texts, called on the host.

    Attributes:
      reader: the policy's.
    """

    context: Context
    function: RewardFunction
    reader: TextReader

    def scores(
        self,
        stage: str,
        name: str,
        prompts: Sequence[str],
        examples: Sequence[Example],
        *,
        batch_size: int,
        of: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """As `SharedTokens.scores`; the function is called with `batch_size` prompts' responses at a time."""
        rows = self.reader.rows(prompts, examples)
        each = len(rows) // len(examples)
        found: dict[int, np.ndarray] = {}
        of = {"batch_size": batch_size, "function": self.function.fingerprint, **(of or {})}
        with self.context.running(stage, name, examples, of) as (keep, progress):
            for entry in keep.earlier():
                found[int(entry["batch"])] = entry["0"]
            for number, begin in enumerate(range(0, len(examples), batch_size)):
                if number in found:
                    continue
                end = min(begin + batch_size, len(examples))
                found[number] = self.function(rows[begin * each : end * each])
                keep.add({"batch": np.asarray(number), "0": found[number]}, end - begin)
                progress(keep.done, {})
                keep.check()
        return np.concatenate([found[number] for number in sorted(found)]).reshape(len(examples), each)

    def batch(self, prompts: Sequence[str | None], joined: PromptBatch) -> tuple[Float[Array, " B"], Metrics]:
        """As `OwnTokens.batch`, but nothing is measured, and the host waits for the function."""
        real, rows = self.reader.batch(prompts, joined)
        scores = np.zeros(len(real), np.float32)
        if rows:
            scores[real] = self.function(rows)
        return place_batch(scores, self.context.mesh), {}


TextScorer = OwnTokens | ByFunction
"""What reads text, and whose scores are an input of PPO's programs."""
Scorer = SharedTokens | TextScorer


def open_scorer(context: Context, reward: Artifact, codec: TextCodec, numerics: Numerics) -> Scorer:
    """What gives the responses of a policy their scores.

    Args:
      reward: what the reward stage has made: a model, or none where the configuration names a function.
      codec: the policy's.
    """
    if context.inputs.reward_function is not None:
        return by_function(context, codec)
    return open_model(context, reward.model, codec, numerics, own=_own_codec_of(reward, codec), frozen=True)


def open_text_scorer(context: Context, reward: Artifact, codec: TextCodec, numerics: Numerics) -> TextScorer | None:
    """What scores a policy's responses as text; None, without reading weights, if the reward model has its tokens.

    Args:
      reward, codec: as for `open_scorer`.
    """
    if context.inputs.reward_function is not None:
        return by_function(context, codec)
    own = _own_codec_of(reward, codec)
    if own is None:
        return None
    scorer = open_model(context, reward.model, codec, numerics, own=own, frozen=True)
    assert isinstance(scorer, OwnTokens)
    return dataclasses.replace(scorer, params=context.offload.frozen_params(scorer.params))


def by_function(context: Context, codec: TextCodec) -> ByFunction:
    """The function that the configuration names, for responses of a policy."""
    function = context.inputs.reward_function
    assert function is not None
    return ByFunction(context, function, TextReader(codec, context.inputs.corpus.conversations))


def open_model(
    context: Context,
    path: str | Path,
    codec: TextCodec,
    numerics: Numerics,
    *,
    own: RewardCodec | None,
    frozen: bool = False,
    label: str | None = None,
) -> SharedTokens | OwnTokens:
    """A reward model with its weights, for responses of a policy.

    Args:
      codec: the policy's.
      own: the reward model's, as `own_codec` gives it.
      frozen: as for `Context.load`.
      label: as for `Context.load`, of models from elsewhere.
    """
    text = codec.config
    if own is None:
        # a stage's own model has a row for every id
        ids = None if frozen else codec.vocab_size
        loaded = context.load(path, numerics, text, head="value", frozen=frozen, num_ids=ids, label=label)
        return SharedTokens(context, *loaded, text, str(path))
    loaded = context.load(path, numerics, None, head="value", frozen=frozen, num_ids=own.vocab_size, label=label)
    return OwnTokens(context, *loaded, text, str(path), own, TextReader(codec, context.inputs.corpus.conversations))


def own_codec(
    tokenizer: PreTrainedTokenizerBase, source: loading.Source, policy: TextCodec, name: str
) -> RewardCodec | None:
    """How texts of a policy become a reward model's rows; None if the policy's ids are its row.

    They are if its tokenizer gives every token the same id, and it was trained here or a conversation means the same
    ids to both chat templates: then its score belongs to the policy's end token.

    Args:
      tokenizer, source: the reward model's.
      name: what the user calls it, for messages.
    """
    if tokenizer.get_vocab() == policy.tokenizer.get_vocab() and (
        source.scored_at_end or _same_conversations(tokenizer, policy)
    ):
        return None
    return RewardCodec.of(tokenizer, source.decoder.max_positions, policy, name)


def _same_conversations(tokenizer: PreTrainedTokenizerBase, policy: TextCodec) -> bool:
    """Whether a reward model's chat template makes of a conversation what a policy reads and writes."""
    theirs, own = tokenizer.chat_template, policy.tokenizer.chat_template
    if not theirs or not own:
        # without one, there are no conversations, or the policy's is the only template
        return True
    return theirs == own and not policy.config.template_options and Chat(tokenizer).continues_prompts


def _own_codec_of(reward: Artifact, codec: TextCodec) -> RewardCodec | None:
    return own_codec(load_tokenizer(reward.model), loading.open_model(reward.model), codec, str(reward.model))
