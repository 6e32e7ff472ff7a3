"""Rows from text files: JSON lines, JSON lists, CSV and TSV, plain or compressed by gzip or zstd."""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from mpo_jax.errors import UserError
from mpo_jax.untrusted import TOO_DEEP, check_parsed, loads, open_file, unrepeated

Row = dict[str, Any]
_PACKED = ("", ".gz", ".zst")
JSON_LINES_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".ndjson") for packed in _PACKED)
JSON_SUFFIXES = (*JSON_LINES_SUFFIXES, *(f".json{packed}" for packed in _PACKED))
TABLE_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".csv", ".tsv") for packed in _PACKED)
SHOWN_COLUMNS = 20
SHOWN_CHARACTERS = 40
_BLANK = re.compile(r"\s*")
_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
MAX_ROW_BYTES = 64 * 2**20
"""Of a line, and of a table's cell: a small compressed file can hold a line that fills the memory."""
MAX_LIST_BYTES = 2**31
"""Of a JSON file that is one list, or objects over several lines, which is held in memory."""


def open_text(name: str, path: Path) -> "JsonFile | TableFile | None":
    """A text file of rows by its suffix; None for another kind of file.

    Args:
      name: of the file, for places.
    """
    lower = path.name.lower()
    if lower.endswith(JSON_SUFFIXES):
        return JsonFile(name, path)
    if lower.endswith(TABLE_SUFFIXES):
        return TableFile(name, path, "\t" if ".tsv" in path.suffixes[-2:] else ",")
    return None


def columns_of(row: Row) -> str:
    """The row's columns in a line, shortened, for messages."""
    names = [str(name) if len(str(name)) <= SHOWN_CHARACTERS else f"{str(name)[:SHOWN_CHARACTERS]}..." for name in row]
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return ", ".join(names[:SHOWN_COLUMNS]) + more or "nothing"


class _Lines:
    """A file's lines as text, each once; `number` is that of the last one read. Errors name it.

    Args:
      lists: whether the first line may hold a list of all rows, and so be longer than others.
    """

    def __init__(self, name: str, path: Path, *, lists: bool = False):
        self.name, self.path, self.number, self.lists = name, path, 0, lists

    def __iter__(self) -> Iterator[str]:
        packed = {".gz": "gzip", ".zst": "zstd"}.get(self.path.suffix.lower())
        try:
            # decoded line by line: text mode decodes ahead, so its error would name a line far from the fault
            with _open(self.path, packed) as stream:
                while encoded := stream.readline(MAX_ROW_BYTES + 1):
                    self.number += 1
                    if len(encoded) > MAX_ROW_BYTES:
                        encoded = self._long(encoded, stream)
                    text = encoded.decode("utf-8")
                    # some programs put a second byte-order mark in front of the first
                    yield text.lstrip("\ufeff") if self.number == 1 else text
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}:{self.number}: not UTF-8 text: {error.reason}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self._broken("gzip", error) from error
        except (pa.ArrowException, OSError) as error:
            # Arrow raises OSError without a number for a broken frame
            if packed == "zstd" and getattr(error, "errno", None) is None:
                raise self._broken("zstd", error) from error
            raise UserError(f"cannot read {self.name}: {getattr(error, 'strerror', None) or error}") from error

    def _long(self, begun: bytes, stream: BinaryIO) -> bytes:
        """A line of more than MAX_ROW_BYTES, if it is a JSON file's list of rows on its first line."""
        if self.lists and self.number == 1 and begun[:100].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            begun += stream.readline(MAX_LIST_BYTES + 1 - len(begun))
            self.check_held(len(begun))
            return begun
        raise UserError(
            f"{self.name}:{self.number}: the line has more than {MAX_ROW_BYTES >> 20} MiB, the most that is read: drop "
            "the row, or write one row per line"
        )

    def check_held(self, size: int) -> None:
        """Raises UserError if more bytes are to be held than of one list of rows."""
        if size > MAX_LIST_BYTES:
            raise UserError(
                f"{self.name}:{self.number}: the list of rows has more than {MAX_LIST_BYTES >> 20} MiB, the most that "
                "is read at once: write one object per line (.jsonl)"
            )

    def held(self, lines: Iterable[str]) -> str:
        """The lines as one text."""
        kept, size = list[str](), 0
        for line in lines:
            size += len(line)
            self.check_held(size)
            kept.append(line)
        return "".join(kept)

    def _broken(self, kind: str, error: Exception) -> UserError:
        return UserError(f"{self.name}: broken or incomplete {kind} file after line {self.number}: {error}")


def _open(path: Path, packed: str | None) -> BinaryIO:
    if packed == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if packed == "zstd":
        return cast(BinaryIO, io.BufferedReader(cast(Any, pa.input_stream(str(path), compression="zstd"))))
    return open_file(path)


@dataclasses.dataclass(frozen=True)
class JsonFile:
    """One JSON object per line, or one list of objects; in a .json file an object may also take several lines.

    Blank lines, a byte-order mark and Windows line endings are ignored. A list is held in memory as text.
    """

    name: str
    path: Path

    def files(self) -> list[Path]:
        return [self.path]

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        return itertools.islice(self._read(), max_rows)

    def _read(self) -> Iterator[tuple[str, Row]]:
        lines = _Lines(self.name, self.path, lists=True)
        stream = iter(lines)
        first = next((line for line in stream if line.strip()), "")
        begin = lines.number
        is_list = first.lstrip().startswith("[")
        if is_list or (".json" in self.path.suffixes[-2:] and _goes_on(first)):
            yield from self._values(lines.held(itertools.chain([first], stream)), begin, is_list=is_list)
            return
        for line in itertools.chain([first], stream):
            if line := line.rstrip():
                place = f"{self.name}:{lines.number}"
                row, end = self._parse(line, _BLANK.match(line).end(), place)  # type: ignore[union-attr]
                if rest := line[end:].strip():
                    column = line.index(rest, end) + 1
                    raise UserError(f"{place}: broken JSON: Extra data (column {column})")
                yield place, row

    def _values(self, text: str, line: int, *, is_list: bool) -> Iterator[tuple[str, Row]]:
        """The objects of a list, or objects one after another.

        Args:
          line: number of the text's first line.
        """
        skip = lambda position: _BLANK.match(text, position).end()  # type: ignore[union-attr]  # noqa: E731
        seen, position = 0, skip(skip(0) + is_list)
        for number in itertools.count(1):
            if position == len(text) and not is_list:
                return
            if text[position : position + 1] == "]" and is_list and number == 1:
                break
            line, seen = line + text.count("\n", seen, position), position
            place = f"{self.name} row {number} (line {line})"
            row, position = self._parse(text, position, place, line=line)
            yield place, row
            position = skip(position)
            if is_list and text[position : position + 1] != ",":
                break
            position = skip(position + is_list)
        if text[position : position + 1] != "]":
            raise UserError(
                f"{self._line(text, position, line, seen)}: broken JSON: a list of rows needs ',' or ']' here"
            )
        if (end := skip(position + 1)) < len(text):
            raise UserError(
                f"{self._line(text, end, line, seen)}: broken JSON: text behind the list of rows: write one list, or "
                "one object per line"
            )

    def _line(self, text: str, position: int, line: int, seen: int) -> str:
        return f"{self.name}:{line + text.count(chr(10), seen, position)}"

    def _parse(self, text: str, position: int, place: str, line: int | None = None) -> tuple[Row, int]:
        """The object at a position, and where it ends; `line` is the position's, where the text has several."""
        try:
            row, end = _DECODER.raw_decode(text, position)
            check_parsed(row)
        except json.JSONDecodeError as error:
            if line is not None:
                place = self._line(text, error.pos, line, position)
            raise UserError(f"{place}: broken JSON: {error.msg} (column {error.colno})") from error
        except RecursionError as error:
            raise UserError(f"{place}: broken JSON: {TOO_DEEP}") from error
        except ValueError as error:
            raise UserError(f"{place}: broken JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{place}: a row must be a JSON object, not {type(row).__name__}: write one object per line, or one "
                "list of objects"
            )
        return row, end


def _goes_on(line: str) -> bool:
    """Whether a line is the beginning of a JSON value that takes several."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


_DECODER = json.JSONDecoder(object_pairs_hook=unrepeated)


@dataclasses.dataclass(frozen=True)
class TableFile:
    """A table whose first line names its columns. Cells are strings; one with a conversation holds it as JSON."""

    name: str
    path: Path
    separator: str

    def files(self) -> list[Path]:
        return [self.path]

    def rows(self, max_rows: int | None = None) -> Iterator[tuple[str, Row]]:
        return itertools.islice(self._read(), max_rows)

    def _read(self) -> Iterator[tuple[str, Row]]:
        csv.field_size_limit(MAX_ROW_BYTES)  # the module's own limit is shorter than some conversations
        lines, columns, begin, size = _Lines(self.name, self.path), list[str](), 1, 0

        def bounded() -> Iterator[str]:
            nonlocal size
            for line in lines:
                size += len(line)
                # quotation marks make one row of any number of lines
                if size > MAX_ROW_BYTES:
                    raise UserError(
                        f"{self.name}:{begin}: the row that begins here has more than {MAX_ROW_BYTES >> 20} MiB, the "
                        "most that is read: close its quotation marks, or drop it"
                    )
                yield line

        reader = csv.reader(bounded(), delimiter=self.separator, strict=True)
        try:
            for cells in reader:
                place, begin, size = f"{self.name}:{begin}", lines.number + 1, 0
                if not cells:
                    continue
                if not columns:
                    columns = self._columns(cells, place)
                    continue
                if len(cells) != len(columns):
                    raise UserError(
                        f"{place}: {len(cells)} cells in a table of {len(columns)} columns: put quotation marks around "
                        "cells that hold the separator or a line break"
                    )
                yield place, {name: self._cell(cell, name, place) for name, cell in zip(columns, cells, strict=True)}
        except csv.Error as error:
            raise UserError(f"{self.name}:{begin}: broken table in the row that begins here: {error}") from error

    def _columns(self, cells: list[str], place: str) -> list[str]:
        columns = [cell.strip() for cell in cells]
        if twice := next((name for name in columns if columns.count(name) > 1), None):
            raise UserError(f"{place}: two columns are called {twice!r}: rename one")
        other = next((mark for mark in ",;\t|" if mark != self.separator and mark in columns[0]), None)
        if len(columns) == 1 and other is not None:
            kind = {",": "commas (.csv)", "\t": "tabs (.tsv)", ";": "semicolons, not commas", "|": "bars, not commas"}[
                other
            ]
            raise UserError(f"{place}: the columns are separated by {kind}: save the table with {self._wanted}")
        return columns

    @property
    def _wanted(self) -> str:
        return "tabs, or call it .csv" if self.separator == "\t" else "commas, or with tabs as .tsv"

    def _cell(self, cell: str, column: str, place: str) -> Any:
        if _CONVERSATION.match(cell) is None:
            return cell
        try:
            return loads(cell, pairs=unrepeated)
        except ValueError as error:
            raise UserError(
                f"{place}: column {column!r} holds a conversation that is not written as JSON: {error}. Save the rows "
                "as .jsonl or .parquet"
            ) from error
