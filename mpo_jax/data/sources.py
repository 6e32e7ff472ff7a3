"""Row sources: text files, parquet, folders, data sets saved by `datasets`, and the Hugging Face hub.

A source yields each row with its place, for error messages, and lists its files, whose content fingerprints the data.
`datasets` is imported only when needed: for folders that it saved and for the hub.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mpo_jax.data.text_files import JSON_LINES_SUFFIXES, JSON_SUFFIXES, TABLE_SUFFIXES, Row, open_text
from mpo_jax.errors import UserError
from mpo_jax.runtime.file_digests import file_digest
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.untrusted import check_file

PARQUET = ".parquet"
FILE_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, PARQUET)
FOLDER_SUFFIXES = (*JSON_LINES_SUFFIXES, PARQUET)
"""What a folder's rows are read from; where there is none of these, from `TABLE_SUFFIXES`."""
ABOUT = ("dataset_info.json", "dataset_infos.json", "metadata.json", "stats.json", "config.json")
"""Files beside rows that are about them."""
HUB = "hub:"
HUB_FORM = "hub:ORG/NAME[@REVISION][:CONFIG or DIR][:SPLIT]"
_HUB_PATTERN = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<part>(?!/)[^:]*))?(?::(?P<split>[\w.]+))?"
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
    """Opens a file with one of `FILE_SUFFIXES`, a folder of such files, a folder saved by `datasets`, or a data set of
    the hub, `HUB_FORM`, whose split is `train` if none is named.

    Raises:
      UserError: if the source does not exist or its kind is unknown.
    """
    if spec.startswith(HUB):
        return _open_hub(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(spec, path)
    if not path.is_file():
        if path.exists():
            check_file(path)  # says what it is instead: rows are read more than once, which no pipe allows
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
class Changed:
    """A source of the rows that `change` makes of another's, given a row's place and the row: one, several or none."""

    source: Source
    change: Callable[[str, Row], Iterable[Row]]

    @property
    def name(self) -> str:
        return self.source.name

    def files(self) -> list[Path]:
        return self.source.files()

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        for place, row in self.source.rows(max_rows):
            for made in self.change(place, row):
                yield place, made


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
    if path.suffix.lower() == PARQUET:
        return _Parquet(name, path)
    if (text := open_text(name, path)) is not None:
        return text
    raise UserError(
        f"{name}: rows are read from files that end in .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz or .zst) "
        "or .parquet"
    )


def _open_folder(name: str, folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(f"{name.rstrip('/')}/{state.parent.name}" for state in sorted(folder.glob("*/state.json")))
        raise UserError(f"{name} holds several splits; name the one to read: {splits or 'it has none'}")
    if (folder / "state.json").is_file():
        return _Saved(name, lambda: _load_folder(name, folder))
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    ending = lambda suffixes: [e for e in entries if e.is_file() and e.name.lower().endswith(suffixes)]  # noqa: E731
    files = ending(FOLDER_SUFFIXES) or ending(TABLE_SUFFIXES)
    if not files:
        inside = ", ".join(entry.name for entry in entries[:10])
        raise UserError(
            f"the folder {name} holds no .jsonl, .parquet, .csv or .tsv file and no data set saved by `datasets`; "
            f"it holds: {inside or 'nothing'}. Name a .json file itself"
        )
    if others := [*_left_out(entries, files)]:
        shown = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        _say_once(
            f"the folder {name} is read as its {', '.join(file.name for file in files[:3])}"
            f"{' ...' if len(files) > 3 else ''} alone, without {shown}: if these hold rows, name the files "
            "themselves, as in data.path=[A,B]"
        )
    return _Many(name, [_open_file(str(file), file) for file in files])


@functools.cache
def _say_once(text: str) -> None:
    """Warns; a folder is opened several times in a run."""
    warn(text)


def _left_out(entries: Sequence[Path], files: Sequence[Path]) -> Iterator[str]:
    """The names of what could hold rows in a folder, and in the folders in it, beside the files that are read."""
    for entry in entries:
        if entry.is_dir():
            inside = (file for file in sorted(entry.iterdir()) if not file.name.startswith("."))
            yield from (f"{entry.name}/{file.name}" for file in inside if _may_hold_rows(file))
        elif entry not in files and _may_hold_rows(entry):
            yield entry.name


def _may_hold_rows(file: Path) -> bool:
    return file.is_file() and file.name.lower().endswith(FILE_SUFFIXES) and file.name not in ABOUT


def _open_hub(spec: str) -> Source:
    parts = _HUB_PATTERN.fullmatch(spec.removeprefix(HUB))
    if parts is None:
        raise UserError(f"{spec!r} is not a hub data set: write {HUB_FORM}")
    name, revision, part, split = parts.group("name", "revision", "part", "split")
    if name == "pandas":
        # not a data set but a builder of `datasets`; some versions of it unpickle files, which can run any code
        raise UserError(f"{spec!r} would read pickled files, which can run code: save them as .parquet or .jsonl")
    return _Saved(spec, lambda: _load_hub(spec, name, revision, part or None, split))


def _load_folder(name: str, folder: Path) -> Any:
    library = _datasets(name)
    try:
        # an in-memory data set lists no files
        return library.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # a missing or damaged file fails in many ways
        raise UserError(f"{name}: broken or incomplete arrow data set: {_reason(error)}") from error


@lru_cache(maxsize=16)
def _load_hub(spec: str, name: str, revision: str | None, part: str | None, split: str | None) -> Any:
    """Cached, so a run's fingerprint and rows come from the same state of the hub."""
    library = _datasets(spec)
    place = _HubPlace(split=split or "train")
    if part is not None:
        place = _find_part(library, name, revision, part, split)
    given = {"revision": revision, "split": place.split, "keep_in_memory": False}
    # a configuration is named only where one was found, so that the others are loaded as they always were
    given |= {"data_dir": place.folder} if place.config is None else {"name": place.config}
    try:
        return library.load_dataset(name, **given)
    except Exception as error:  # several libraries raise their own types
        raise UserError(f"cannot load {spec}: {_reason(error)}. {place.known}{_hub_advice(name, error)}") from error


@dataclasses.dataclass(frozen=True)
class _HubPlace:
    """Where in a hub data set the rows are.

    Attributes:
      known: what else there is, for the message if nothing is here.
    """

    split: str
    config: str | None = None
    folder: str | None = None
    known: str = ""


def _find_part(library: Any, name: str, revision: str | None, part: str, split: str | None) -> _HubPlace:
    """What the part after a data set's name is: a configuration, else a split of the only one, else a folder."""
    configs = _listed(lambda: library.get_dataset_config_names(name, revision=revision))
    if part in configs:
        return _HubPlace(split or "train", config=part, known=f"Its configurations: {', '.join(configs)}. ")
    known = f"Its configurations: {', '.join(configs)}. " if configs else ""
    if split is None and len(configs) == 1:
        splits = _listed(lambda: library.get_dataset_split_names(name, configs[0], revision=revision))
        if part in splits:
            return _HubPlace(part)
        known = f"Its splits: {', '.join(splits)}. " if splits else known
    return _HubPlace(split or "train", folder=part, known=known)


def _listed(names: Callable[[], Sequence[str]]) -> list[str]:
    """The names that the hub gives; none where it cannot be asked: loading then says why."""
    try:
        return list(names())
    except Exception:  # several libraries raise their own types
        return []


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
            f"hub:{name}@refs/convert/parquet[:CONFIG or DIR][:SPLIT]"
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
