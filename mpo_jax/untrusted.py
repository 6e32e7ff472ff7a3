"""Files that others wrote: opened only where they are files, and parsed within limits.

A damaged or hostile file ends in a message that names it: not in a hang (a pipe in place of a file), a crash of the
interpreter (YAML in deep brackets), or a RecursionError (JSON in deep brackets).
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from mpo_jax.errors import UserError

T = TypeVar("T")

MAX_BYTES = 64 * 2**20
"""Of a file that is read whole. The largest tokenizer.json and weight indices have a third of that."""
MAX_DEPTH = 100
"""Nested lists and mappings; files that people and libraries write have fewer than ten."""
OCTAL = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")
BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
"""Numbers that YAML 1.1 does not read as people do."""
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
MAX_DIGITS = 100
"""Of an integer. tokenizer_config.json's model_max_length has 31; floating point ends at 309."""
TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Where a shell puts the pipes that a user writes as `<(command)`; their other end is open."""
_LONG_INTEGER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_LARGEST = 10**MAX_DIGITS
_KINDS = {dict: "an object", list: "a list", str: "a text"}


def open_file(path: str | Path) -> BinaryIO:
    """Opens a file for reading, if it is one: opening a pipe without a writer would wait for ever.

    Raises:
      UserError: if there is none, it cannot be read, or it is a folder, a pipe, a socket or a device.
    """
    try:
        # without O_NONBLOCK, a pipe that takes the file's place after a check would still hang
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the file: {reason(error)}") from error
    piped = stat.S_ISFIFO(mode) and str(path).startswith(PIPES)
    if not (stat.S_ISREG(mode) or piped):
        os.close(descriptor)
        raise UserError(f"cannot read {path}: it is {_kind(mode)}, not a file")
    if piped:
        os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def check_file(path: str | Path) -> None:
    """Raises UserError as `open_file`: for libraries that open a file by its name."""
    open_file(path).close()


def read_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """A whole file.

    Raises:
      UserError: as `open_file`; or if it is larger than `max_bytes`.
    """
    with open_file(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot read the file: {reason(error)}") from error
    if len(data) > max_bytes:
        raise UserError(f"{path}: the file has more than {max_bytes} bytes, the most that is read of its kind")
    return data


def read_text(path: str | Path, *, max_bytes: int = MAX_BYTES, encoding: str = "utf-8") -> str:
    """A whole file as text.

    Raises:
      UserError: as `read_bytes`; or if it is no text in this encoding.
    """
    try:
        return read_bytes(path, max_bytes=max_bytes).decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(path: str | Path, kind: type[T] = dict, *, max_bytes: int = MAX_BYTES) -> T:
    """The value in a JSON file.

    Args:
      kind: what it must be: dict, list, or object for anything.

    Raises:
      UserError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), path, kind)


def parse_json(text: str | bytes, where: str | Path, kind: type[T] = dict) -> T:
    """The value that JSON spells.

    Args:
      where: the file, for messages; with a line where it is one of several.
      kind: as for `read_json`.

    Raises:
      UserError: broken JSON, a key that stands twice, a value of another kind, deeper than MAX_DEPTH, or an integer
        of more than MAX_DIGITS.
    """
    try:
        value = loads(text, pairs=unrepeated)
    except ValueError as error:
        raise UserError(f"{where}: broken JSON: {error}") from error
    if not isinstance(value, kind):
        wanted = _KINDS.get(kind, kind.__name__)
        raise UserError(f"{where}: broken JSON: expected {wanted}, found {type(value).__name__}")
    return value


def loads(text: str | bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that JSON spells, for callers that name its place themselves.

    Args:
      pairs: makes an object of its keys and values, in place of dict.

    Raises:
      ValueError: broken JSON, deeper than MAX_DEPTH, or an integer of more than MAX_DIGITS.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    # the hook makes parsing slower, so only where there are such digits, which may also be those of a text
    hook = _integer if _LONG_INTEGER.search(text) else None
    try:
        value = json.loads(text, parse_int=hook, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_parsed(value)
    return value


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values; which one of two would count differs between libraries.

    Raises:
      ValueError: if a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the key {twice!r} stands twice in one object: remove one")
    return found


def check_parsed(value: Any) -> None:
    """Checks what a parser let through, whose own limits are higher: what reads it recurses too, and numbers overflow.

    Raises:
      ValueError: lists and mappings nested more than MAX_DEPTH deep, or an integer of more than MAX_DIGITS.
    """
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        inside: list[Any] = []
        for one in level:
            for part in one.values() if type(one) is dict else one:
                kind = type(part)
                if kind is dict or kind is list:
                    inside.append(part)
                elif kind is int and not -_LARGEST < part < _LARGEST:
                    raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
        if not inside:
            return
        level = inside
    raise ValueError(TOO_DEEP)


def check_yaml(text: str, where: str | Path) -> None:
    """Checks the nesting of YAML before it is loaded, since the loader recurses in C and ends the process; and that no
    number is written in base 8 or 60, since YAML 1.1 reads 010 as 8 and 1:30 as 90.

    What is broken in another way is left to the loader.

    Raises:
      UserError: YAML deeper than MAX_DEPTH, or such a number; names the line.
    """
    depth = 0
    with contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.ScalarEvent) and (event.implicit[0] or event.tag in NUMBER_TAGS):
                base = 8 if OCTAL.fullmatch(event.value) else 60 if BASE_60.fullmatch(event.value) else 10
                if base != 10:
                    raise UserError(
                        f"{where}:{line}: YAML reads {event.value} as a number of base {base}: write it as a decimal "
                        "number without leading zeros, or as text in quotes"
                    )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"{where}:{line}: broken YAML: nested more than {MAX_DEPTH} deep")


def read_yaml(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a YAML file, of plain types.

    Raises:
      UserError: as `read_text` and `check_yaml`; broken YAML; or a tag with a value that is none of its kind.
    """
    text = read_text(path, max_bytes=max_bytes)
    check_yaml(text, path)
    with loading_yaml(path):
        return yaml.safe_load(text)


@contextlib.contextmanager
def loading_yaml(where: str | Path) -> Iterator[None]:
    """Turns what a YAML loader raises into a UserError with the line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: broken YAML: {error.problem}") from error
    except Exception as error:  # constructors of tags fail in their own ways: `!!int x`, `!!timestamp x`
        raise UserError(f"cannot read {where}: broken YAML: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What went wrong, in one line; of the operating system's errors without number and path."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return said or type(error).__name__


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits: at most {MAX_DIGITS} are read")
    return int(digits)


def _kind(mode: int) -> str:
    tests = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, is_one in tests.items() if is_one(mode)), "a device")
