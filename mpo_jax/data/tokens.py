"""Rows of text to rows of ids, counted, and kept on disk so that a later run need not tokenize them again."""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from mpo_jax.data.text import CHUNK_TEXTS, TextCodec

FORMAT = 1
VISIT_STEP = 0x9E3779B9
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}

Ids = Sequence[int] | np.ndarray
"""Token ids: a list, or a one-dimensional int32 array."""

Row = tuple[str, tuple[str, ...]]
"""A prompt and its responses."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A tokenized prompt with its responses.

    Attributes:
      visit: how many rows before this one have the same prompt, where rows are sampled from (see `number_visits`).
    """

    prompt: Ids
    responses: Sequence[Ids]
    visit: int = 0

    @property
    def fingerprint(self) -> int:
        """32 bits of sha256 of the prompt's ids."""
        return int.from_bytes(hashlib.sha256(np.asarray(self.prompt, np.int32).tobytes()).digest()[:4], "big")

    @property
    def key(self) -> int:
        """32 bits that the row's random numbers are folded from: another key for every visit of a prompt."""
        # an odd step is a permutation of the residues, so that no two visits share a key
        return (self.fingerprint + self.visit * VISIT_STEP) % 2**32


@dataclasses.dataclass
class TokenReport:
    """What tokenization did.

    Attributes:
      rows: how many.
      truncated_prompts: rows whose prompt was cut.
      truncated_responses: rows of which any response was cut.
      prompt_tokens: p50, p90, p99 and max of the prompts' tokens before cutting, BOS included; empty without rows.
      response_tokens: the same of the responses', EOS included.
    """

    rows: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    prompt_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    response_tokens: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, int | dict[str, int]]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Table:
    """All texts' ids in one flat array: the different prompts in order of appearance, then the rows' responses.

    Attributes:
      ids: int32, one text's after the other's.
      length: [texts] int32.
      full: [texts] int32, lengths before cutting.
    """

    ids: np.ndarray
    length: np.ndarray
    full: np.ndarray


def tokenize(codec: TextCodec, rows: Sequence[Row], *, cache: Path | None = None) -> tuple[list[Example], TokenReport]:
    """Tokenizes (prompt, responses) rows and counts what was cut.

    Args:
      codec: the tokenizer with its limits.
      rows: a prompt and its responses each; equal prompts are tokenized once and share their ids.
      cache: folder of finished results, by content. One that cannot be read or written costs time, never an error.

    Returns:
      One example a row, whose ids are read-only int32 views into one array, and the report.
    """
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in rows))}
    responses = [response for _, row in rows for response in row]
    path = None if cache is None else cache / f"{_key(codec, rows)}.npz"
    table = None if path is None else _read(path, len(numbers) + len(responses))
    if table is None:
        table = _encode(codec, list(numbers), responses)
        if path is not None:
            _write(path, table)
    return _examples(table, rows, numbers), _report(table, rows, numbers)


def number_visits(examples: Sequence[Example]) -> list[Example]:
    """The same rows, those whose prompt has come before numbered, so that each row draws samples of its own."""
    seen: Counter[int] = Counter()
    numbered = []
    for example in examples:
        fingerprint = example.fingerprint
        visit = seen[fingerprint]
        seen[fingerprint] += 1
        numbered.append(dataclasses.replace(example, visit=visit) if visit else example)
    return numbered


def _encode(codec: TextCodec, prompts: Sequence[str], responses: Sequence[str]) -> _Table:
    ids, length, full = [np.zeros(0, np.int32)], [], []
    for encode, texts in ((codec.prompts, prompts), (codec.responses, responses)):
        # lists of ids take nine times the memory of int32, so they exist for one part of the texts at a time
        for begin in range(0, len(texts), CHUNK_TEXTS):
            for fitted in encode(texts[begin : begin + CHUNK_TEXTS]):
                ids.append(np.asarray(fitted.ids, np.int32))
                length.append(len(fitted.ids))
                full.append(fitted.full)
    return _Table(np.concatenate(ids), np.asarray(length, np.int32), np.asarray(full, np.int32))


def _examples(table: _Table, rows: Sequence[Row], numbers: dict[str, int]) -> list[Example]:
    table.ids.flags.writeable = False
    ends = np.cumsum(table.length, dtype=np.int64).tolist()
    texts = [table.ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    responses = iter(texts[len(numbers) :])
    return [Example(texts[numbers[prompt]], [next(responses) for _ in row]) for prompt, row in rows]


def _report(table: _Table, rows: Sequence[Row], numbers: dict[str, int]) -> TokenReport:
    cut = table.full > table.length
    prompts = np.asarray([numbers[prompt] for prompt, _ in rows], np.int64)
    owner = np.repeat(np.arange(len(rows)), [len(row) for _, row in rows])
    return TokenReport(
        rows=len(rows),
        truncated_prompts=int(cut[prompts].sum()),
        truncated_responses=len(np.unique(owner[cut[len(numbers) :]])),
        prompt_tokens=_percentiles(table.full[prompts]),
        response_tokens=_percentiles(table.full[len(numbers) :]),
    )


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Each the smallest length that so many percent do not exceed."""
    if not len(lengths):
        return {}
    return {name: int(np.percentile(lengths, p, method="inverted_cdf")) for name, p in PERCENTILES.items()}


def _key(codec: TextCodec, rows: Sequence[Row]) -> str:
    """Sha256 of everything that the table depends on; lengths go before texts, so that no two lists of rows collide."""
    versions = f"{FORMAT} {tokenizers.__version__} {transformers.__version__} {codec.fingerprint}"
    digest = hashlib.sha256(versions.encode())
    for prompt, responses in rows:
        texts = [text.encode("utf-8", "surrogatepass") for text in (prompt, *responses)]
        digest.update(f"|{len(texts)}:{','.join(str(len(text)) for text in texts)}|".encode())
        digest.update(b"".join(texts))
    return digest.hexdigest()


def _read(path: Path, num_texts: int) -> _Table | None:
    """The cached table, or None where there is none that is whole."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            table = _Table(file["ids"], file["length"], file["full"])
    except Exception:  # a damaged zip file raises almost anything
        return None
    sound = (
        all(array.dtype == np.int32 and array.ndim == 1 for array in (table.ids, table.length, table.full))
        and len(table.length) == len(table.full) == num_texts
        and int(table.length.sum(dtype=np.int64)) == len(table.ids)
        and bool((table.length >= 0).all() and (table.length <= table.full).all())
    )
    return table if sound else None


def _write(path: Path, table: _Table) -> None:
    # written beside and renamed: other processes may write the same file, and a killed one must leave no part of it
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            np.savez(part, allow_pickle=False, ids=table.ids, length=table.length, full=table.full)
            os.replace(part, path)
