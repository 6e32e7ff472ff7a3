"""Text to ids and back: tokenizer, templates, truncation. Prompt and response are tokenized apart and joined as ids."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mpo_jax.config import TextConfig
from mpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Token ids within their limit, and whether anything was cut to get there."""

    ids: list[int]
    truncated: bool


class TextCodec:
    """A Hugging Face tokenizer with this project's joining rules.

    Exactly one BOS starts a prompt where the tokenizer itself adds one (or `text.add_bos` says so); exactly one EOS
    ends a complete response; a response cut short carries none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TextConfig):
        self.tokenizer = tokenizer
        self.config = config
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer defines no EOS token: add eos_token to its tokenizer_config.json")
        self.eos_id: int = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        if config.add_bos == "true" and self.special("bos") is None:
            raise UserError("text.add_bos=true, but the tokenizer defines no BOS token: set text.add_bos=auto")

    @cached_property
    def adds_bos(self) -> bool:
        """Whether rows start with BOS."""
        if self.config.add_bos != "auto":
            return self.config.add_bos == "true"
        bos = self.special("bos")
        return bos is not None and self.tokenizer("a").input_ids[:1] == [bos]

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer puts a space before every text it is given, as SentencePiece models do."""
        tokens = self.tokenizer.convert_ids_to_tokens(self.tokenizer("a", add_special_tokens=False).input_ids)
        return bool(tokens) and str(tokens[0]).startswith("\u2581")

    @cached_property
    def _decodes_without_space(self) -> bool:
        return not str(self.tokenizer.decode(self._encode("a"))).startswith(" ")

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer can produce: the largest plus one."""
        return len(self.tokenizer)

    def special(self, name: Literal["bos", "pad"]) -> int | None:
        """A special token's id, where the tokenizer defines one."""
        value = getattr(self.tokenizer, f"{name}_token_id")
        return None if value is None else int(value)

    def allowed(self, vocab_size: int) -> np.ndarray:
        """[V] bool, the ids that may be sampled: no pad, BOS, unknown or other special token but EOS, no extra row."""
        allowed = np.zeros(vocab_size, bool)
        allowed[: min(self.vocab_size, vocab_size)] = True
        for special in self.tokenizer.all_special_ids:
            allowed[special] = False
        allowed[self.eos_id] = True
        return allowed

    def prompt(self, text: str) -> Fitted:
        """The templated prompt's ids, BOS first where one is added; too long a prompt keeps its end.

        Raises:
          UserError: if nothing is left, since a response needs a token to follow.
        """
        templated = self.config.prompt_template.replace("{prompt}", text)
        ids = self._encode(templated)
        bos = self.special("bos")
        start = [bos] if self.adds_bos and bos is not None else []
        room = self.config.max_prompt_tokens - len(start)
        if room < 1 or not start + ids:
            raise UserError(
                f"no room for a prompt: text.max_prompt_tokens={self.config.max_prompt_tokens} holds no token of "
                f"{templated[:40]!r}; raise it or drop empty prompts"
            )
        return Fitted(start + ids[-room:], len(ids) > room)

    def response(self, text: str) -> Fitted:
        """The response's ids with EOS; too long a response loses its end, EOS included. Empty text gives EOS alone."""
        # the tokenizer's own space stands for the one that the response begins with, so that the seam holds one
        text = text[1:] if self.adds_space and text.startswith(" ") else text
        # text that spells a special token stays text: a "</s>" inside a response would end it
        ids = [*self._encode(text, split_special_tokens=True), self.eos_id]
        limit = self.config.max_response_tokens
        return Fitted(ids[:limit], len(ids) > limit)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of response ids up to the first EOS, with the space at its start that joins it to the prompt."""
        kept = [int(i) for i in ids]
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        starts_with_space = bool(kept) and str(self.tokenizer.convert_ids_to_tokens(kept[0])).startswith("\u2581")
        return " " + text if self.adds_space and starts_with_space and self._decodes_without_space else text

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)

    def _encode(self, text: str, **options: Any) -> list[int]:
        # verbose warns of texts longer than the model takes, which are cut here
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **options).input_ids)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a Hugging Face folder.

    Raises:
      UserError: if the folder holds none or it cannot be read.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder} holds no tokenizer.json or tokenizer.model: a model folder needs its tokenizer")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the parser in Rust raises nothing more special
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error
    return tokenizer
