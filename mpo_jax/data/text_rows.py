"""Responses as text, with their prompts as the data has them: what a scorer reads that knows no policy's tokens."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mpo_jax.data.chat import Message
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example
from mpo_jax.runtime.processes import to_host
from mpo_jax.types import PromptBatch


@dataclasses.dataclass(frozen=True)
class TextRow:
    """A response to a prompt.

    Attributes:
      prompt: plain text, or the turns of a conversation.
      response: as it follows a plain prompt, a leading space included; in a conversation the turn's text, stripped.
      complete: whether the response ended by itself, rather than at the limit of its tokens.
    """

    prompt: str | tuple[Message, ...]
    response: str
    complete: bool

    @classmethod
    def of(
        cls, prompt: str, response: str, *, complete: bool, conversations: Mapping[str, tuple[Message, ...]]
    ) -> "TextRow":
        """A prompt of the corpus, which may be a rendered conversation, with a response.

        Args:
          conversations: turns of the prompts that are conversations, by their rendered text.
        """
        turns = conversations.get(prompt)
        return cls(prompt, response, complete) if turns is None else cls(turns, response.strip(), complete)


@dataclasses.dataclass(frozen=True)
class TextReader:
    """Reads a policy's ids as text.

    Attributes:
      codec: the policy's.
      conversations: turns of the prompts that are conversations, by the text that the policy's chat template renders.
    """

    codec: TextCodec
    conversations: Mapping[str, tuple[Message, ...]]

    def rows(self, prompts: Sequence[str], examples: Sequence[Example]) -> list[TextRow]:
        """[E N] rows in one list: each example's responses after another.

        Args:
          prompts: [E] prompts of the corpus.
          examples: the same in the policy's tokens, with their N responses.
        """
        pairs = zip(prompts, examples, strict=True)
        return [self._row(prompt, response) for prompt, example in pairs for response in example.responses]

    def batch(self, prompts: Sequence[str | None], joined: PromptBatch) -> tuple[np.ndarray, list[TextRow]]:
        """[B] bool, which rows of a batch of samples are no padding, and these rows. The host waits for the samples.

        Args:
          prompts: [B] prompts of the corpus; None for padding.
          joined: the samples (N = 1), on the devices.
        """
        ids_BS, length_B = to_host(joined.response)[:, 0], to_host(joined.response_len)[:, 0]
        rows = [
            self._row(prompt, ids[:length])
            for prompt, ids, length in zip(prompts, ids_BS, length_B, strict=True)
            if prompt is not None
        ]
        return np.asarray([prompt is not None for prompt in prompts]), rows

    def _row(self, prompt: str, response: Sequence[int] | np.ndarray) -> TextRow:
        text = self.codec.decode(response)
        complete = len(response) > 0 and int(response[-1]) in self.codec.end_ids
        return TextRow.of(prompt, text, complete=complete, conversations=self.conversations)
