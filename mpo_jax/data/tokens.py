"""Tokenizes rows of text, counts truncations, and caches the ids on disk for later runs."""

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
from mpo_jax.data.token_lists import Growing, Ids, TokenLists

FORMAT = 1
VISIT_STEP = 0x9E3779B9
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}

SHOWN_ROWS = 5

Row = tuple[str, tuple[str, ...]]
"""A prompt and its responses."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A tokenized prompt with its responses.

    Attributes:
      visit: number of earlier rows with the same prompt, for rows to sample from (see `number_visits`).
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
        """32 bits to fold into the row's random key; each visit of a prompt has its own."""
        # multiplying by an odd step permutes the residues mod 2**32, so no two visits share a key
        return (self.fingerprint + self.visit * VISIT_STEP) % 2**32


@dataclasses.dataclass
class TokenReport:
    """Counts of truncated rows, and token statistics.

    Attributes:
      rows: number of rows.
      truncated_prompts: number of rows with a truncated prompt.
      truncated_responses: number of rows with at least one truncated response.
      equal_responses: numbers, from 1, of the rows whose two responses are other texts but the same tokens since one
        of them was cut: such a pair teaches nothing.
      indistinct_responses: the same of rows whose responses are whole: the tokenizer writes both texts alike.
      empty_responses: numbers, from 1, of the rows with a response of no token but EOS.
      prompt_tokens: p50, p90, p99 and max of the prompt lengths before truncation, BOS included; empty without rows.
      response_tokens: the same statistics of the response lengths, EOS included.
    """

    rows: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    equal_responses: list[int] = dataclasses.field(default_factory=list)
    indistinct_responses: list[int] = dataclasses.field(default_factory=list)
    empty_responses: list[int] = dataclasses.field(default_factory=list)
    prompt_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    response_tokens: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, int | dict[str, int]]:
        """The report as plain values; rows are counted, not listed."""
        listed = ("equal_responses", "indistinct_responses", "empty_responses")
        counted = {name: len(getattr(self, name)) for name in listed}
        return dataclasses.asdict(self) | counted

    def findings(self, name: str, max_response_tokens: int) -> list[str]:
        """What is wrong with the rows of the set `name` once they are tokens, a sentence each."""
        found = []
        if self.equal_responses:
            found.append(
                f"{len(self.equal_responses)} of {self.rows} {name} have equal sides once they are cut to "
                f"text.max_response_tokens={max_response_tokens}, and teach nothing: raise it, or drop them. "
                f"{_listed(self.equal_responses)}"
            )
        if self.indistinct_responses:
            found.append(
                f"{len(self.indistinct_responses)} of {self.rows} {name} have sides that the tokenizer writes with the "
                "same tokens, such as one for unknown characters, and teach nothing: drop them. "
                f"{_listed(self.indistinct_responses)}"
            )
        if self.empty_responses:
            found.append(
                f"{len(self.empty_responses)} of {self.rows} {name} have a response without tokens, and teach to end "
                f"at once: data.filter=strict drops such rows. {_listed(self.empty_responses)}"
            )
        return found


@dataclasses.dataclass(frozen=True)
class _Table:
    """Ids of all texts in one flat array: the distinct prompts in order of appearance, then the responses row by row.

    Attributes:
      ids: int32, concatenated ids of all texts.
      length: [texts] int32, number of ids of each text.
      full: [texts] int32, the same before truncation.
    """

    ids: np.ndarray
    length: np.ndarray
    full: np.ndarray


def tokenize(codec: TextCodec, rows: Sequence[Row], *, cache: Path | None = None) -> tuple[list[Example], TokenReport]:
    """Tokenizes (prompt, responses) rows and counts truncations.

    Args:
      codec: tokenizer with its limits.
      rows: pairs of a prompt and its responses; equal prompts are tokenized once and share their ids.
      cache: folder of earlier results, keyed by content. Read and write errors are ignored; the rows are then tokenized
        again.

    Returns:
      One example per row, with ids that are read-only int32 views into one array, and the report.
    """
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in rows))}
    responses = [response for _, row in rows for response in row]
    path = None if cache is None else cache / f"{_key(codec, rows)}.npz"
    table = None if path is None else _read(path, len(numbers) + len(responses))
    if table is None:
        table = _encode(codec, list(numbers), responses)
        if path is not None:
            _write(path, table)
    examples = _examples(table, rows, numbers)
    return examples, _report(table, rows, numbers, examples)


def number_visits(examples: Sequence[Example]) -> list[Example]:
    """The same rows with `visit` set on repeated prompts, so each row draws its own samples."""
    seen: Counter[int] = Counter()
    numbered = []
    for example in examples:
        fingerprint = example.fingerprint
        visit = seen[fingerprint]
        seen[fingerprint] += 1
        numbered.append(dataclasses.replace(example, visit=visit) if visit else example)
    return numbered


def _encode(codec: TextCodec, prompts: Sequence[str], responses: Sequence[str]) -> _Table:
    found, full = Growing(), []
    for encode, texts in ((codec.prompts, prompts), (codec.responses, responses)):
        # the tokenizer's lists of ids exist for one chunk of texts at a time
        for begin in range(0, len(texts), CHUNK_TEXTS):
            for fitted in encode(texts[begin : begin + CHUNK_TEXTS]):
                found.add(fitted.ids)
                full.append(fitted.full)
    lists = found.lists
    return _Table(lists.ids, np.diff(lists.ends, prepend=0).astype(np.int32), np.asarray(full, np.int32))


def _examples(table: _Table, rows: Sequence[Row], numbers: dict[str, int]) -> list[Example]:
    table.ids.flags.writeable = False
    lists = TokenLists(table.ids, np.cumsum(table.length, dtype=np.int64))
    # equal prompts share one view
    prompts, responses = [lists[i] for i in range(len(numbers))], iter(range(len(numbers), len(lists)))
    return [Example(prompts[numbers[prompt]], [lists[next(responses)] for _ in row]) for prompt, row in rows]


def _report(table: _Table, rows: Sequence[Row], numbers: dict[str, int], examples: Sequence[Example]) -> TokenReport:
    cut = table.full > table.length
    prompts = np.asarray([numbers[prompt] for prompt, _ in rows], np.int64)
    owner = np.repeat(np.arange(len(rows)), [len(row) for _, row in rows])
    shortened = set(owner[cut[len(numbers) :]].tolist())
    equal = [i for i, row in enumerate(examples) if _same_tokens(row, rows[i][1])]
    return TokenReport(
        rows=len(rows),
        truncated_prompts=int(cut[prompts].sum()),
        truncated_responses=len(shortened),
        equal_responses=[i + 1 for i in equal if i in shortened],
        indistinct_responses=[i + 1 for i in equal if i not in shortened],
        empty_responses=sorted({int(i) + 1 for i in owner[table.full[len(numbers) :] == 1]}),
        prompt_tokens=_percentiles(table.full[prompts]),
        response_tokens=_percentiles(table.full[len(numbers) :]),
    )


def _listed(numbers: Sequence[int]) -> str:
    """The numbers of the first rows."""
    more = "" if len(numbers) <= SHOWN_ROWS else f" and {len(numbers) - SHOWN_ROWS} more"
    return f"Rows of the set: {', '.join(map(str, numbers[:SHOWN_ROWS]))}{more}"


def _same_tokens(example: Example, texts: Sequence[str]) -> bool:
    """Whether two different texts have become the same tokens."""
    if len(texts) != 2 or texts[0] == texts[1]:
        return False
    first, second = example.responses
    return len(first) == len(second) and np.array_equal(first, second)


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Percentiles of the lengths by name, each an observed length; empty without lengths."""
    if not len(lengths):
        return {}
    return {name: int(np.percentile(lengths, p, method="inverted_cdf")) for name, p in PERCENTILES.items()}


def _key(codec: TextCodec, rows: Sequence[Row]) -> str:
    """sha256 of everything the table depends on; lengths precede the texts, so two lists of rows never hash alike."""
    versions = f"{FORMAT} {tokenizers.__version__} {transformers.__version__} {codec.fingerprint}"
    digest = hashlib.sha256(versions.encode())
    for prompt, responses in rows:
        texts = [text.encode("utf-8", "surrogatepass") for text in (prompt, *responses)]
        digest.update(f"|{len(texts)}:{','.join(str(len(text)) for text in texts)}|".encode())
        digest.update(b"".join(texts))
    return digest.hexdigest()


def _read(path: Path, num_texts: int) -> _Table | None:
    """The cached table; None if it is missing or damaged."""
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
    # written to a temporary folder, then renamed: another process may write the same file, and a kill must not leave a
    # partial one
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            np.savez(part, allow_pickle=False, ids=table.ids, length=table.length, full=table.full)
            os.replace(part, path)
