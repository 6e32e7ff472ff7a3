"""Atomic writes: a file is written completely or not at all. And reading files that may be late or damaged."""

import codecs
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpo_jax.errors import Damaged, UserError
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.untrusted import loads

VISIBLE_S = 180.0
"""How long a file on a shared file system may take to appear. NFS, the slowest of them, lets a client remember for 60 s
(acdirmax) that a file was missing or shorter; three times that is a fault."""


AS_JSON = "backslashreplace"
"""What becomes of a lone surrogate in JSON: its escape, which reads back as the same text."""
MISPLACED = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""Errors of a file that is missing, or has a folder in its place."""
OPENED = re.compile(r"/dev/(?:(stdout|stderr)|fd/(\d+))")
"""Names of what a process has open."""
SHOWN_CHARACTERS = 120
"""Of a library's own message."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False), "\n"], errors=AS_JSON)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, atomically."""
    write_lines_together({path: rows})


def write_lines_together(files: Mapping[Path, Iterable[Mapping[str, Any]]]) -> None:
    """Writes files of rows as JSON lines; none takes its place before all of them are written."""
    with contextlib.ExitStack() as written:
        for path, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            written.enter_context(_taking_its_place(path, codecs.iterencode(lines, "utf-8", AS_JSON)))


def write_text(path: Path, parts: Iterable[str], *, encoding: str = "utf-8", errors: str = "replace") -> None:
    """Writes the parts one after the other, atomically; line ends are kept.

    Args:
      errors: of a lone surrogate, which a JSON escape can carry and no file can hold: Python's name of what becomes of
        it. To fail at the end would lose everything that is to be written.
    """
    write_bytes(path, codecs.iterencode(parts, encoding, errors))


def write_bytes(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file atomically: a temporary file beside it is flushed to disk and renamed. Makes the folder.

    A link stays, and the file that it leads to is written. A device or a pipe, such as /dev/null, gets the bytes.
    """
    with _taking_its_place(path, parts):
        pass


@contextlib.contextmanager
def _taking_its_place(path: Path, parts: Iterable[bytes]) -> Iterator[None]:
    """Writes as `write_bytes` does; the file takes its place at the end of the block, unless the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_stream(path):
        # what is open already is not opened again: another place in the file would be written
        descriptor = OPENED.fullmatch(path.as_posix())
        number = {"stdout": 1, "stderr": 2}.get(descriptor[1]) or int(descriptor[2]) if descriptor else None
        with open(path if number is None else os.dup(number), "wb") as stream:
            stream.writelines(parts)
        yield
        return
    path = path.resolve() if path.is_symlink() else path
    # nobody can foresee the name and put a link there, and two processes have a file each
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with STOPS.removing(temporary), _removed_on_error(temporary, path):
        with open(temporary, "wb", opener=lambda name, _: os.open(name, new, 0o666)) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield
        os.replace(temporary, path)


@contextlib.contextmanager
def _removed_on_error(temporary: Path, path: Path) -> Iterator[None]:
    """Removes a temporary file whose writing fails; the error names the file that it was to become."""
    try:
        yield
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and (error.filename is None or error.filename == str(temporary))
        ):
            error.filename = str(path)
        raise


def is_stream(path: Path) -> bool:
    """Whether bytes go into it as it is, instead of into a file that takes its place: a device, a pipe, or what the
    shell has opened, such as /dev/stdout.
    """
    return path.exists() and not path.is_dir() and (not path.is_file() or bool(OPENED.fullmatch(path.as_posix())))


def wait_for_files(folder: Path, sizes: Mapping[str, int], *, timeout_s: float = VISIBLE_S) -> None:
    """Returns once files that another host has written are all here, whole.

    Args:
      sizes: bytes of each file, by its name in the folder.

    Raises:
      UserError: if one has not appeared in time.
    """
    begin = time.monotonic()
    while missing := [name for name, size in sizes.items() if _size(folder / name) != size]:
        if time.monotonic() - begin > timeout_s:
            name = missing[0]
            found = _size(folder / name)
            seen = "is not there" if found is None else f"has {found} of {sizes[name]} bytes"
            raise UserError(
                f"{folder / name} {seen} on {socket.gethostname()}, {timeout_s:g} s after process 0 wrote it "
                f"({len(missing)} of {len(sizes)} files are missing). All hosts need one workdir on a file system that "
                "they share, or runtime.bucket"
            )
        # a client that reads a folder asks the server again whether a name exists
        for stale in (folder.parent, folder, (folder / missing[0]).parent):
            with contextlib.suppress(OSError):
                os.listdir(stale)
        time.sleep(0.2)


def anew(folder: Path) -> str:
    """What to do about a damaged file in a stage's folder."""
    return f"delete the folder {folder}, and the next run makes it anew"


@contextlib.contextmanager
def naming_damage(path: Path, remedy: str) -> Iterator[None]:
    """Turns what a reader of the file raises into a message that names the file and what to do.

    Args:
      remedy: in the imperative: "delete the folder X, and the next run makes it anew".

    Raises:
      Damaged: if the file is missing, empty, torn, of another kind, or does not hold what the reader expects. Errors of
        the disk and of permissions are raised as they are.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        # to open a pipe would wait for ever
        raise Damaged(path, "is no file, but a pipe, a socket or a device", remedy)
    try:
        yield
    except UserError:
        raise
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # Arrow's reader raises an OSError without a number for a damaged file
        if isinstance(error, OSError) and error.errno not in (None, *MISPLACED):
            raise
        raise Damaged(path, _damage(path, error), remedy) from error


def read_json(path: Path, remedy: str) -> Any:
    """The value in a JSON file; errors as those of `naming_damage`."""
    with naming_damage(path, remedy):
        return loads(path.read_text(encoding="utf-8"))


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; errors as those of `naming_damage`."""
    found = read_json(path, remedy)
    if not isinstance(found, dict):
        raise Damaged(path, f"holds no JSON object, but a {type(found).__name__}", remedy)
    return found


def read_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, of which there is one at least; errors as those of `naming_damage`."""
    rows: list[dict[str, Any]] = []
    with naming_damage(path, remedy), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = loads(line)
            except ValueError:
                raise Damaged(path, f"is damaged in line {number}", remedy) from None
            if not isinstance(row, dict):
                raise Damaged(path, f"holds no JSON object in line {number}", remedy)
            rows.append(row)
    if not rows:
        raise Damaged(path, "is empty", remedy)
    return rows


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that could not be read, after its name."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is missing"
    if not path.exists():
        return "is missing"
    if path.is_dir():
        return "is a folder and should be a file"
    if not path.stat().st_size:
        return "is empty"
    if isinstance(error, UnicodeDecodeError):
        return "is damaged (no UTF-8 text)"
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"is damaged ({type(error).__name__}: {reason[:SHOWN_CHARACTERS]})"


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    """Bytes of a file; None if it cannot be seen."""
    try:
        return path.stat().st_size
    except OSError:
        return None
