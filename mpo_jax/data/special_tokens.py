"""Text that spells special tokens, such as a response that ends with `<|im_end|>`: found, stripped and counted."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

from transformers import PreTrainedTokenizerBase

from mpo_jax.data.chat import Message, Reply
from mpo_jax.runtime.words import counted

END_MARKERS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>", "<|eom_id|>")
"""Ends of turns and texts in widespread models' data: they end no response of another model's either."""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as special tokens, without blank ones; longer ones first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({text for text in (*tokenizer.all_special_tokens, *added) if text.strip()}, key=len, reverse=True)


class SpelledTokens:
    """Strips end markers that responses spell, and counts what else spells special tokens.

    Args:
      tokenizer: factory of the policy's tokenizer; called once a text could spell a special token.
      end_markers: the value of text.end_markers.
    """

    def __init__(self, tokenizer: Callable[[], PreTrainedTokenizerBase], end_markers: Literal["strip", "keep"]):
        self._tokenizer, self._strip = tokenizer, end_markers == "strip"
        self._found: dict[str, Counter[str]] = {kind: Counter() for kind in ("ends", "inside", "turns")}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, special_tokens(self._tokenizer()))) or r"(?!)")

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """End markers; longer ones first."""
        # "<unk>" is a word of some data
        own = [token.strip() for token in special_tokens(self._tokenizer()) if token != self._tokenizer().unk_token]
        return tuple(sorted({*own, *END_MARKERS}, key=len, reverse=True))

    def _end(self, text: str) -> tuple[int, str] | None:
        """Where one end marker or several begin at the end of a text, with the space before them, and the last one.

        From the end, marker by marker: a search from the start takes the square of the length of some texts.
        """
        end, last = _before_space(text, len(text)), None
        while text.endswith(self._ends, 0, end):
            marker = next(marker for marker in self._ends if text.endswith(marker, 0, end))
            end, last = _before_space(text, end - len(marker)), last or marker
        return None if last is None else (end, last)

    def response(self, reply: Reply) -> Reply:
        """The reply without end markers at its end."""
        if not isinstance(reply, str):
            return reply
        if reply.rstrip().endswith((">", "]")) and (end := self._end(reply)):
            self._found["ends"][end[1]] += 1
            reply = reply[: end[0]] if self._strip else reply
        elif _may_spell(reply) and (inside := self._special.search(reply)):
            self._found["inside"][inside[0]] += 1
        return reply

    def prompt(self, prompt: str | Sequence[Message]) -> None:
        """Counts a conversation whose turns spell special tokens. A plain prompt may have them on purpose."""
        for turn in () if isinstance(prompt, str) else prompt:
            if _may_spell(turn["content"]) and (inside := self._special.search(turn["content"])):
                self._found["turns"][inside[0]] += 1
                return

    def warnings(self) -> list[str]:
        """What has been found, each kind in a sentence with its count."""
        says: dict[str, str] = {
            "ends": "{} as text, which is stripped, since the policy would learn to spell it: text.end_markers=keep "
            "leaves it in"
            if self._strip
            else "{} as text, which the policy learns to spell: text.end_markers=strip takes it out",
            "inside": "{} as text, which the policy learns to spell: clean these rows if that is not meant",
            "turns": "{}, which the tokenizer reads as such, so that a turn can end early: clean these rows",
        }
        return [says[kind].format(self._counted(kind)) for kind, found in self._found.items() if found]

    def stripped(self) -> str | None:
        """How many responses are without an end marker now, for what scores them; None: none."""
        if not (self._strip and self._found["ends"]):
            return None
        return f"{self._counted('ends')} as text, which is not scored: text.end_markers=keep leaves it in"

    def _counted(self, kind: str) -> str:
        """`2 responses end with a special token, such as </s>`."""
        found = self._found[kind]
        number = found.total()
        subjects = {
            "ends": (counted(number, "response ends", "responses end"), "with"),
            "inside": (counted(number, "response has", "responses have"), "inside"),
            "turns": (counted(number, "conversation has", "conversations have"), "inside a turn"),
        }
        return f"{' '.join(subjects[kind])} a special token, such as {found.most_common(1)[0][0]}"


def _before_space(text: str, end: int) -> int:
    """Where the whitespace before `end` begins."""
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _may_spell(text: str) -> bool:
    """Whether it is worth a closer look: special tokens stand in brackets."""
    return "<" in text or "[" in text
