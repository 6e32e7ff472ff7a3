"""Rows: what a data file holds, checked and counted. HH-RLHF dialogues and plain preference rows, from local JSONL."""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and a response to imitate. `group` decides on which side of the validation split the row falls."""

    prompt: str
    response: str
    group: str


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt with a preferred and a less preferred response."""

    prompt: str
    chosen: str
    rejected: str
    group: str


@dataclasses.dataclass
class DataReport:
    """What became of the rows of one source: read = kept + dropped; drops are counted by reason."""

    source: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "read": self.read, "kept": self.kept, "dropped": dict(self.dropped)}


def read_jsonl(path: Path, max_rows: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a .jsonl or .jsonl.gz file; blank lines are skipped.

    Raises:
      UserError: a missing file, broken compression, text that is not UTF-8, or a line that is no JSON object.
    """
    if not path.is_file():
        raise UserError(f"no data file {path}: check data.path, data.sft_path and data.test_path")
    count = 0
    number = 0
    try:
        # lines are decoded one by one: a text file decodes ahead, and its error would name a line long before the fault
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, encoded in enumerate(lines, 1):
                line = encoded.decode("utf-8").rstrip()
                if not line:
                    continue
                if max_rows is not None and count >= max_rows:
                    return
                count += 1
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: a row must be a JSON object, not {type(row).__name__}")
                yield number, row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: broken JSON: {error.msg} (column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text: {error.reason}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken or incomplete gzip file after line {number}: {error}") from error


def _text(row: dict[str, Any], field: str, path: Path, number: int) -> str:
    if field not in row:
        raise UserError(f"{path}:{number}: the row has no field {field!r}; it has: {', '.join(row) or 'nothing'}")
    if not isinstance(row[field], str):
        raise UserError(f"{path}:{number}: field {field!r} must be a string, not {type(row[field]).__name__}")
    try:
        row[field].encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}:{number}: field {field!r} holds half a surrogate pair, which is no character"
        ) from error
    return row[field]


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read_hh(path: Path, *, strict: bool = True, max_rows: int | None = None) -> tuple[list[Preference], DataReport]:
    """HH-RLHF rows {chosen, rejected}: the prompt is everything through the last `\\n\\nAssistant:` of chosen.

    Strict drops, by counted reason: equal sides, a rejected side with another prompt, an empty response, turns that do
    not alternate. Otherwise every row is kept, a foreign rejected side with what follows its own last turn.
    """
    report = DataReport(str(path))
    rows = []
    for number, row in read_jsonl(path, max_rows):
        report.read += 1
        chosen, rejected = _text(row, "chosen", path, number), _text(row, "rejected", path, number)
        cut = chosen.rfind(ASSISTANT)
        prompt = chosen[: cut + len(ASSISTANT)] if cut >= 0 else ""
        if strict and (reason := _hh_fault(chosen, rejected, prompt)):
            report.drop(reason)
            continue
        own = rejected.startswith(prompt)
        rejected_response = rejected[len(prompt) :] if own else rejected.rpartition(ASSISTANT)[2]
        rows.append(Preference(prompt, chosen[len(prompt) :], rejected_response, prompt))
    report.kept = len(rows)
    return rows, report


def _hh_fault(chosen: str, rejected: str, prompt: str) -> str | None:
    if chosen == rejected:
        return "chosen equals rejected"
    if not prompt:
        return "no assistant turn"
    if not rejected.startswith(prompt):
        return "rejected has another prompt"
    if not chosen[len(prompt) :].strip() or not rejected[len(prompt) :].strip():
        return "empty response"
    responses = chosen[len(prompt) :] + rejected[len(prompt) :]
    if not _alternates(prompt) or HUMAN in responses or ASSISTANT in responses:
        return "turns do not alternate"
    return None


def _alternates(prompt: str) -> bool:
    expected = HUMAN
    rest = prompt
    while rest:
        if not rest.startswith(expected):
            return False
        following = [at for turn in (HUMAN, ASSISTANT) if (at := rest.find(turn, len(expected))) >= 0]
        rest = rest[min(following) :] if following else ""
        expected = ASSISTANT if expected == HUMAN else HUMAN
    return expected == HUMAN


def read_preferences(path: Path, *, max_rows: int | None = None) -> tuple[list[Preference], DataReport]:
    """Rows {prompt, chosen, rejected} of strings. Drops equal sides and empty responses, counted."""
    report = DataReport(str(path))
    rows = []
    for number, row in read_jsonl(path, max_rows):
        report.read += 1
        prompt, chosen, rejected = (_text(row, field, path, number) for field in ("prompt", "chosen", "rejected"))
        if chosen == rejected:
            report.drop("chosen equals rejected")
        elif not prompt.strip():
            report.drop("empty prompt")
        elif not chosen.strip() or not rejected.strip():
            report.drop("empty response")
        else:
            rows.append(Preference(prompt, chosen, rejected, prompt))
    report.kept = len(rows)
    return rows, report


def read_demonstrations(path: Path, *, max_rows: int | None = None) -> tuple[list[Demonstration], DataReport]:
    """Rows {prompt, response} or {prompt, completion} of strings. Drops empty ones, counted."""
    report = DataReport(str(path))
    rows = []
    for number, row in read_jsonl(path, max_rows):
        report.read += 1
        field = "completion" if "completion" in row and "response" not in row else "response"
        prompt, response = _text(row, "prompt", path, number), _text(row, field, path, number)
        if not prompt.strip():
            report.drop("empty prompt")
        elif not response.strip():
            report.drop("empty response")
        else:
            rows.append(Demonstration(prompt, response, prompt))
    report.kept = len(rows)
    return rows, report


def is_validation(group: str, *, seed: int, fraction: float) -> bool:
    """Whether a group of rows is validation: sha256(seed|group) mod 10000 < 10000 fraction.

    It depends on neither row order nor process count, and rows of one prompt stay together.
    """
    digest = hashlib.sha256(f"{seed}|{group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % 10000 < round(10000 * fraction)


def fingerprint_files(paths: Iterable[Path]) -> str:
    """sha256 over the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise UserError(f"no data file {path}: check data.path, data.sft_path and data.test_path")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


Kind = Literal["hh", "pairs"]


def read_pairs_of(kind: Kind, path: Path, *, strict: bool, max_rows: int | None) -> tuple[list[Preference], DataReport]:
    """Preference rows of a file of the given kind."""
    if kind == "hh":
        return read_hh(path, strict=strict, max_rows=max_rows)
    return read_preferences(path, max_rows=max_rows)
