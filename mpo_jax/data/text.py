"""Text to ids and back: tokenizer, templates, truncation.

Prompt and response are tokenized separately and joined as ids.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from mpo_jax.config.schema import TextConfig
from mpo_jax.errors import UserError
from mpo_jax.models.hf.ends import end_ids
from mpo_jax.models.hf.tokenizer import input_ids

# per tokenizer call: enough texts to keep its threads busy, few enough to hold their offsets and masks in memory
CHUNK_TEXTS = 1000
CHUNK_CHARACTERS = 4_000_000
LOOK_AHEAD = 12


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Token ids within the limit, and their number before truncation; both include BOS and EOS."""

    ids: list[int]
    full: int

    @property
    def truncated(self) -> bool:
        """Whether ids were cut."""
        return self.full > len(self.ids)


class TextCodec:
    """A Hugging Face tokenizer with this project's rules for joining prompt and response.

    A prompt starts with exactly one BOS if the tokenizer itself adds one (or `text.add_bos` says so). A complete
    response ends with exactly one EOS; a truncated response has none. Sampled responses may also end with another of
    the model's end tokens; the first one that occurs counts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TextConfig):
        self.tokenizer = tokenizer
        self.config = config
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer defines no EOS token: add eos_token to its tokenizer_config.json")
        self.eos_id: int = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.end_ids = end_ids(tokenizer)
        if config.add_bos == "true" and self.special("bos") is None:
            raise UserError("text.add_bos=true, but the tokenizer defines no BOS token: set text.add_bos=auto")

    @cached_property
    def adds_bos(self) -> bool:
        """Whether prompts start with BOS."""
        if self.config.add_bos != "auto":
            return self.config.add_bos == "true"
        bos = self.special("bos")
        return bos is not None and input_ids(self.tokenizer, "a")[:1] == [bos]

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer prepends a space to every text, as SentencePiece models do."""
        tokens = self.tokenizer.convert_ids_to_tokens(input_ids(self.tokenizer, "a", add_special_tokens=False))
        return bool(tokens) and str(tokens[0]).startswith("\u2581")

    @cached_property
    def _decodes_without_space(self) -> bool:
        return not str(self.tokenizer.decode(self._encode(["a"])[0])).startswith(" ")

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.fromiter(self.tokenizer.get_vocab().values(), np.int64)

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer can produce: the largest id plus one."""
        return int(self._ids.max()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that ids depend on: the tokenizer's state, special tokens and text settings."""
        config = self.config.model_dump(
            include={"max_prompt_tokens", "max_response_tokens", "prompt_template", "truncation"}
        )
        parts = json.dumps([config, self.adds_bos, str(self.tokenizer.special_tokens_map)], sort_keys=True)
        return hashlib.sha256(parts.encode() + _state(self.tokenizer)).hexdigest()

    @property
    def ends(self) -> int | tuple[int, ...]:
        """What ends a sampled response: an id, or several."""
        return self.eos_id if len(self.end_ids) == 1 else self.end_ids

    def special(self, name: Literal["bos", "pad"]) -> int | None:
        """A special token's id; None if the tokenizer does not define it."""
        value = getattr(self.tokenizer, f"{name}_token_id")
        return None if value is None else int(value)

    def allowed(self, vocab_size: int) -> np.ndarray:
        """[V] bool, the ids that may be sampled: the tokenizer's ids, without special tokens that end nothing."""
        allowed = np.zeros(vocab_size, bool)
        allowed[self._ids[self._ids < vocab_size]] = True
        added = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        allowed[[*self.tokenizer.all_special_ids, *added]] = False
        allowed[list(self.end_ids)] = True
        return allowed

    def prompt(self, text: str) -> Fitted:
        """`prompts` of one text."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[Fitted]:
        """Ids of the templated prompts, with at most one BOS: the tokenizer's, or the one written by a chat template.

        A prompt that is too long loses the end of its POST section or its start, as `text.truncation` says.

        Raises:
          UserError: if no token is left for a response to follow, or if the section to cut is missing.
        """
        templated = [self.templated(text) for text in texts]
        return [self._fit_prompt(text, ids) for text, ids in zip(templated, self._encode(templated), strict=True)]

    def templated(self, text: str) -> str:
        """The prompt in `text.prompt_template`."""
        return self.config.prompt_template.replace("{prompt}", text)

    def as_seen(self, texts: Sequence[str]) -> list[str]:
        """The prompts as a model reads them, as text without BOS: templated, and truncated if too long."""
        return [
            str(self.tokenizer.decode(self._split_bos(fitted.ids)[1], clean_up_tokenization_spaces=False))
            if fitted.truncated
            else self.templated(text)
            for text, fitted in zip(texts, self.prompts(texts), strict=True)
        ]

    def response(self, text: str) -> Fitted:
        """`responses` of one text."""
        return self.responses([text])[0]

    def responses(self, texts: Sequence[str]) -> list[Fitted]:
        """Ids of the responses with EOS; if too long, the end is cut, EOS included. Empty text gives EOS alone."""
        # a tokenizer that prepends a space supplies the response's leading one; the join must hold exactly one
        seamed = [text[1:] if self.adds_space and text.startswith(" ") else text for text in texts]
        # special tokens spelled out in a response stay text; as a token, a "</s>" would end the response
        whole = [[*ids, self.eos_id] for ids in self._encode(seamed, split_special_tokens=True)]
        return [Fitted(ids[: self.config.max_response_tokens], len(ids)) for ids in whole]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of response ids up to the first end token, with the leading space that joins it to the prompt."""
        kept = list(itertools.takewhile(lambda i: i not in self.end_ids, map(int, ids)))
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        starts_with_space = bool(kept) and str(self.tokenizer.convert_ids_to_tokens(kept[0])).startswith("\u2581")
        return " " + text if self.adds_space and starts_with_space and self._decodes_without_space else text

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)

    def _encode(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        # verbose=False: no warning about over-long texts, since this class truncates them
        options |= {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return [
            list(ids) for chunk in _chunks(texts) for ids in input_ids(self.tokenizer, chunk, verbose=False, **options)
        ]

    def _split_bos(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The start of the row, [BOS] or nothing, and the ids after it."""
        bos = self.special("bos")
        written = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        return ([bos] if bos is not None and (written or self.adds_bos) else []), ids[written:]

    def _fit_prompt(self, text: str, ids: list[int]) -> Fitted:
        start, ids = self._split_bos(ids)
        room = self.config.max_prompt_tokens - len(start)
        if room < 1 or not start + ids:
            raise UserError(
                f"no room for a prompt: text.max_prompt_tokens={self.config.max_prompt_tokens} holds no token of "
                f"{text[:40]!r}; raise it or drop empty prompts"
            )
        full = len(start) + len(ids)
        if len(ids) > room:
            shorter = None if self.config.truncation == "start" else self._cut_post(text, full, room)
            ids = ids[-room:] if shorter is None else shorter
        return Fitted(start + ids, full)

    def _cut_post(self, text: str, full: int, room: int) -> list[int] | None:
        """Ids without BOS of the text with a shortened POST section; None without one, or if the rest is too long."""
        section = _post_section(text)
        if section is None:
            if self.config.truncation == "auto":
                return None
            raise UserError(
                f"text.truncation=post, but the prompt {text[:40]!r} of {full} tokens has no text between 'POST:' and "
                "'\\n\\nTL;DR:' to cut: set text.truncation=auto or start, or raise text.max_prompt_tokens"
            )
        begin, end = section

        def fit(stops: Sequence[int]) -> list[list[int] | None]:
            whole = self._encode([text[:stop] + text[end:] for stop in stops])
            return [ids if len(ids) <= room else None for ids in (self._split_bos(ids)[1] for ids in whole)]

        # cutting at an empty first line would leave nothing of the post
        lines = [m.start() for m in re.finditer(r"\r?\n", text[:end]) if text[begin : m.start()].strip()]
        return _last_fit(lines, fit) or _last_fit(range(begin, end), fit)


def _last_fit(stops: Sequence[int], fit: Callable[[Sequence[int]], list[list[int] | None]]) -> list[int] | None:
    """`fit` of the last stop (ascending) for which it is not None, found by bisection."""
    best, low, high = None, 0, len(stops)
    while low < high:
        middle = (low + high) // 2
        (ids,) = fit([stops[middle]])
        if ids is None:
            high = middle
        else:
            best, low = ids, middle + 1
    # not monotonic: part of a word can take more tokens than the whole word, so look a few stops further
    for ids in fit(stops[low : low + LOOK_AHEAD]):
        best = ids or best
    return best


def _post_section(text: str) -> tuple[int, int] | None:
    """Start and end of the text between the first "POST:" (preferably at a line start) and the last "TL;DR:"."""
    start = re.search(r"^POST:", text, re.MULTILINE) or re.search("POST:", text)
    end = text.rfind("\n\nTL;DR:")
    return None if start is None or end < start.end() else (start.end(), end)


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        if chunk and (len(chunk) == CHUNK_TEXTS or characters + len(text) > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(text)
        characters += len(text)
    if chunk:
        yield chunk


def _state(tokenizer: Any) -> bytes:
    """The tokenizer's state, without the padding and truncation settings left by its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        return json.dumps(state | {"padding": None, "truncation": None}, sort_keys=True).encode()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        files = b"".join(path.read_bytes() for path in sorted(Path(folder).iterdir()))
    return f"{type(tokenizer).__name__} {tokenizer.init_kwargs} {tokenizer.get_added_vocab()}".encode() + files
