"""Text to the ids of a reward model that has a tokenizer of its own."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mpo_jax.data.chat import Chat
from mpo_jax.data.text import CHUNK_TEXTS
from mpo_jax.data.text_rows import TextRow
from mpo_jax.data.tokens import Example
from mpo_jax.errors import UserError


class RewardCodec:
    """A reward model's tokenizer, with the way in which a prompt and its response become one row of ids.

    A conversation is rendered whole by the tokenizer's own chat template. A plain prompt and its response are tokenized
    as one text with the special tokens that the tokenizer adds; a complete response ends with its EOS, if it has one.
    The score is the logit at the row's last token.

    Args:
      max_tokens: length of a row. Longer ones lose the start of their prompt, after a BOS.
      template: function from a plain prompt to the text that a response follows.
      name: what the user calls the reward model, for messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        *,
        template: Callable[[str], str] = str,
        name: str = "the reward model",
    ):
        self.tokenizer, self.max_tokens, self.name, self._template = tokenizer, max_tokens, name, template

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer can produce: the largest id plus one."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def _chat(self) -> Chat:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.name} has a tokenizer of its own without a chat template, but the rows are conversations or "
                "text.chat=true: use a reward model whose tokenizer has one (chat_template.jinja)"
            )
        # each row must get a score, so a system turn is never refused
        return Chat(self.tokenizer, fold_system=True, name=f"the chat template of {self.name}")

    def examples(self, rows: Sequence[TextRow]) -> tuple[list[Example], int]:
        """Rows as examples whose response is the last token, where the score is read, and how many were cut.

        Raises:
          UserError: if a conversation cannot be rendered, or a row has a single token.
        """
        ids: list[list[int]] = []
        for begin in range(0, len(rows), CHUNK_TEXTS):
            ids += self._ids(rows[begin : begin + CHUNK_TEXTS])
        cut = sum(len(row) > self.max_tokens for row in ids)
        return [self._example(self._fitted(row)) for row in ids], cut

    def _ids(self, rows: Sequence[TextRow]) -> list[list[int]]:
        """Ids of each row, however many."""
        found: list[list[int]] = [[] for _ in rows]
        chats = [isinstance(row.prompt, tuple) for row in rows]
        for chat in (False, True):
            places = [place for place, is_chat in enumerate(chats) if is_chat == chat]
            if not places:
                continue
            options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
            texts = [self._text(rows[place]) for place in places]
            # a chat template writes the special tokens itself
            for place, ids in zip(
                places, self.tokenizer(texts, add_special_tokens=not chat, **options).input_ids, strict=True
            ):
                found[place] = list(ids) if chat else self._ended(list(ids), rows[place].complete)
        return found

    def _text(self, row: TextRow) -> str:
        if isinstance(row.prompt, str):
            return self._template(row.prompt) + row.response
        return self._chat.conversation(row.prompt, row.response)

    def _ended(self, ids: list[int], complete: bool) -> list[int]:
        eos: Any = self.tokenizer.eos_token_id
        if eos is None or (complete and ids[-1:] == [eos]):
            return ids
        return [*ids, int(eos)] if complete else ids

    def _fitted(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_tokens:
            return ids
        start = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return [*start, *ids[len(start) + len(ids) - self.max_tokens :]]

    def _example(self, ids: list[int]) -> Example:
        if len(ids) < 2:
            raise UserError(f"{self.name}: prompt and response together are {len(ids)} of its tokens: drop empty rows")
        whole = np.asarray(ids, np.int32)
        return Example(whole[:-1], [whole[-1:]])
