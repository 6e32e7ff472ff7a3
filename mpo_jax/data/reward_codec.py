"""Text to the ids of a reward model that reads text in its own way, by its own tokenizer and chat template."""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mpo_jax.data.chat import Chat
from mpo_jax.data.text import CHUNK_TEXTS, TextCodec
from mpo_jax.data.text_rows import TextRow
from mpo_jax.data.tokens import Example
from mpo_jax.errors import UserError
from mpo_jax.models.hf.tokenizer import input_ids

LENGTH_FACTOR = 2
"""How many more tokens than a policy's limits a text may have in a reward model's."""


class RewardCodec:
    """A reward model's tokenizer, with the way in which a prompt and its response become one row of ids.

    A conversation is rendered whole by the tokenizer's own chat template. A plain prompt and its response are tokenized
    as one text with the special tokens that the tokenizer adds; a complete response ends with its EOS, if it has one.
    One that was cut at its limit ends where it was cut, without what the template or the tokenizer writes at an end.
    Special tokens that a response spells out stay text. The score is the logit at the row's last token.

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

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, positions: int, policy: TextCodec, name: str) -> "RewardCodec":
        """For texts of a policy: rows twice as long as its limits, as tokens differ, if the model has room.

        Args:
          positions: of the reward model.
        """
        limits = policy.config
        most = min(positions, LENGTH_FACTOR * (limits.max_prompt_tokens + limits.max_response_tokens))
        return cls(tokenizer, most, template=policy.templated, name=name)

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
            texts = [self._parts(rows[place]) for place in places]
            spelling = [i for i, (_, response, _) in enumerate(texts) if self._spells_special(response)]
            # a chat template writes the special tokens itself
            whole = self._encode(["".join(parts) for parts in texts], add_special_tokens=not chat)
            for i in spelling:
                whole[i] = self._encode_apart(texts[i], chat=chat)
            for place, ids in zip(places, whole, strict=True):
                found[place] = ids if chat else self._ended(ids, rows[place].complete)
        return found

    def _parts(self, row: TextRow) -> tuple[str, str, str]:
        """The text of a row: before the response, the response, and after it."""
        if isinstance(row.prompt, str):
            return self._template(row.prompt), row.response, ""
        header, reply, footer = self._chat.conversation(row.prompt, row.response)
        # what follows would say that the reply had ended there
        return header, reply, footer if row.complete else ""

    def _spells_special(self, response: str) -> bool:
        return any(token in response for token in self._special_tokens)

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple({*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)} - {""})

    def _encode_apart(self, parts: tuple[str, str, str], *, chat: bool) -> list[int]:
        """Ids of a row whose response spells out special tokens: there they stay text, and end nothing."""
        header, response, footer = parts
        if not (chat or self._spells_special(header)):
            return self._encode([header + response], add_special_tokens=True, split_special_tokens=True)[0]
        before, after = self._encode([header, footer], add_special_tokens=False)
        (inside,) = self._encode([response], add_special_tokens=False, split_special_tokens=True)
        return [*([] if chat else self._start), *before, *inside, *after]

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text."""
        return list(itertools.takewhile(lambda i: i == self.tokenizer.bos_token_id, input_ids(self.tokenizer, "a")))

    def _encode(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        options |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return [list(ids) for ids in input_ids(self.tokenizer, list(texts), **options)]

    def _ended(self, ids: list[int], complete: bool) -> list[int]:
        """A plain row with one BOS at most, and with an EOS if and only if its response is complete."""
        bos: Any = self.tokenizer.bos_token_id
        if bos is not None:
            written = next((i for i, token in enumerate(ids) if token != bos), len(ids))
            ids = ids[max(written - 1, 0) :]
        eos: Any = self.tokenizer.eos_token_id
        if eos is None or (ids[-1:] == [eos]) == complete:
            return ids
        return [*ids, int(eos)] if complete else ids[:-1]

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
