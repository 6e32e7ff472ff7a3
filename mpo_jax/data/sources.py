"""Row sources: JSON lines, parquet, folders, data sets saved by `datasets`, and the Hugging Face hub.

A source yields each row with its place, for error messages, and lists its files, whose content fingerprints the data.
`datasets` is imported only when needed: for folders that it saved and for the hub.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mpo_jax.errors import UserError
from mpo_jax.runtime.file_digests import file_digest

Row = dict[str, Any]
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
FOLDER_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB = "hub:"
HUB_FORM = "hub:ORG/NAME[@REVISION][:DIR][:SPLIT]"
_HUB_PATTERN = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<folder>(?!/)[^:]*))?(?::(?P<split>[\w.]+))?"
)
# rows decoded at a time; small, because some rows take a megabyte
_PARQUET_BATCH = 256


class Source(Protocol):
    """A place that holds rows."""

    @property
    def name(self) -> str:
        """The name that the user gave."""
        ...

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        """Yields (place, row), at most `max_rows` per file; places count from 1: "file.jsonl:12", "file.parquet row 3".

        Raises:
          UserError: if a row cannot be read, with its place.
        """
        ...

    def files(self) -> list[Path]:
        """The files that hold the rows, in row order."""
        ...


def open_source(spec: str) -> Source:
    """Opens a .jsonl, .json (one object per line), .jsonl.gz, .json.gz or .parquet file, a folder of .jsonl, .jsonl.gz
    or .parquet files, a folder saved by `datasets`, or `hub:ORG/NAME[@REVISION][:DIR][:SPLIT]` (default: `train`).

    Raises:
      UserError: if the source does not exist or its kind is unknown.
    """
    if spec.startswith(HUB):
        return _open_hub(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(spec, path)
    if not path.is_file():
        raise UserError(f"no data file {spec} (a data set of the Hugging Face hub is {HUB_FORM})")
    return _open_file(spec, path)


def fingerprint_files(paths: Iterable[Path], cache: Path | None = None) -> str:
    """sha256 of the files' contents, in order.

    Args:
      cache: folder of digests from earlier runs (see runtime/file_digests.py).

    Raises:
      UserError: if a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise UserError(f"no data file {path}")
        try:
            digest.update(bytes.fromhex(file_digest(path, cache)))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _JsonLines:
    """One JSON object per line; blank lines, a byte-order mark and Windows line endings are ignored."""

    name: str
    path: Path

    def files(self) -> list[Path]:
        return [self.path]

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        count = number = 0
        try:
            # decoded line by line: text mode decodes ahead, so its error would name a line far from the fault
            with gzip.open(self.path, "rb") if self.path.suffix == ".gz" else self.path.open("rb") as lines:
                for number, encoded in enumerate(lines, 1):
                    line = encoded.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                    if not line:
                        continue
                    if max_rows is not None and count >= max_rows:
                        return
                    count += 1
                    yield f"{self.name}:{number}", self._parse(line, number)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}:{number}: not UTF-8 text: {error.reason}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.name}: broken or incomplete gzip file after line {number}: {error}") from error
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {error.strerror or error}") from error

    def _parse(self, line: str, number: int) -> Row:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{self.name}:{number}: broken JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of brackets
            raise UserError(f"{self.name}:{number}: JSON that cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{self.name}:{number}: a row must be a JSON object, not {type(row).__name__}: "
                "write one object per line"
            )
        return row


@dataclasses.dataclass(frozen=True)
class _Parquet:
    """A parquet file, read in batches."""

    name: str
    path: Path

    def files(self) -> list[Path]:
        return [self.path]

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        def read() -> Iterator[Row]:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                    yield from batch.to_pylist()

        return _numbered(self.name, read, max_rows, "parquet file")


@dataclasses.dataclass(frozen=True)
class _Saved:
    """Arrow files written by the library `datasets`: a saved folder, or a hub data set in its cache."""

    name: str
    load: Callable[[], Any]

    def files(self) -> list[Path]:
        return [Path(file["filename"]) for file in self.load().cache_files]

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        # a format saved with the data set could hide columns or turn strings into arrays
        return _numbered(self.name, lambda: iter(self.load().with_format(None)), max_rows, "arrow data set")


@dataclasses.dataclass(frozen=True)
class _Many:
    """Several files as one source; `max_rows` applies to each file."""

    name: str
    parts: Sequence[Source]

    def files(self) -> list[Path]:
        return [file for part in self.parts for file in part.files()]

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        return itertools.chain.from_iterable(part.rows(max_rows) for part in self.parts)


def _numbered(
    name: str, read: Callable[[], Iterator[Row]], max_rows: int | None, kind: str
) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        for number, row in enumerate(itertools.islice(read(), max_rows), 1):
            yield f"{name} row {number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name}: broken or incomplete {kind} after row {number}: {_reason(error)}") from error


def _open_file(name: str, path: Path) -> Source:
    if path.name.endswith(JSON_SUFFIXES):
        return _JsonLines(name, path)
    if path.suffix == ".parquet":
        return _Parquet(name, path)
    raise UserError(f"{name}: rows are read from files that end in {', '.join(JSON_SUFFIXES)} or .parquet")


def _open_folder(name: str, folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(f"{name.rstrip('/')}/{state.parent.name}" for state in sorted(folder.glob("*/state.json")))
        raise UserError(f"{name} holds several splits; name the one to read: {splits or 'it has none'}")
    if (folder / "state.json").is_file():
        return _Saved(name, lambda: _load_folder(name, folder))
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and entry.name.endswith(FOLDER_SUFFIXES)]
    if not files:
        inside = ", ".join(entry.name for entry in entries[:10])
        raise UserError(
            f"the folder {name} holds no {', '.join(FOLDER_SUFFIXES)} file and no data set saved by `datasets`; "
            f"it holds: {inside or 'nothing'}"
        )
    return _Many(name, [_open_file(str(file), file) for file in files])


def _open_hub(spec: str) -> Source:
    parts = _HUB_PATTERN.fullmatch(spec.removeprefix(HUB))
    if parts is None:
        raise UserError(f"{spec!r} is not a hub data set: write {HUB_FORM}")
    name, revision, folder, split = parts.group("name", "revision", "folder", "split")
    if name == "pandas":
        # not a data set but a builder of `datasets`; some versions of it unpickle files, which can run any code
        raise UserError(f"{spec!r} would read pickled files, which can run code: save them as .parquet or .jsonl")
    return _Saved(spec, lambda: _load_hub(spec, name, revision, folder or None, split or "train"))


def _load_folder(name: str, folder: Path) -> Any:
    library = _datasets(name)
    try:
        # an in-memory data set lists no files
        return library.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # a missing or damaged file fails in many ways
        raise UserError(f"{name}: broken or incomplete arrow data set: {_reason(error)}") from error


@lru_cache(maxsize=16)
def _load_hub(spec: str, name: str, revision: str | None, folder: str | None, split: str) -> Any:
    """Cached, so a run's fingerprint and rows come from the same state of the hub."""
    library = _datasets(spec)
    try:
        return library.load_dataset(name, data_dir=folder, revision=revision, split=split, keep_in_memory=False)
    except Exception as error:  # several libraries raise their own types
        raise UserError(f"cannot load {spec}: {_reason(error)}. {_hub_advice(name, error)}") from error


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs the package datasets, which is not installed: pip install datasets") from error
    return datasets


def _hub_advice(name: str, error: Exception) -> str:
    text = str(error)
    if "scripts are no longer supported" in text:
        return (
            "Its loading script is not run: name the files that the hub converted it to, "
            f"hub:{name}@refs/convert/parquet[:DIR][:SPLIT]"
        )
    if "gated" in text:
        return f"Ask for access at https://huggingface.co/datasets/{name} and log in with `hf auth login`"
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx"):
        return "Check the connection (and HF_HUB_OFFLINE), or download the files and name them instead"
    return (
        f"Check the spelling of {HUB_FORM}; a private data set needs `hf auth login`; "
        "or download the files and name them instead"
    )


def _reason(error: Exception) -> str:
    """The error's first line, without anything that looks like an access token."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"hf_\w+", "hf_***", lines[0]).rstrip(".")
