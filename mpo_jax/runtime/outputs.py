"""Checks of what a command is going to write, before it reads or computes anything."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mpo_jax.errors import UserError
from mpo_jax.runtime.files import is_stream

LONGEST_NAME = 255
"""Bytes of a file's name, on all usual file systems."""


def check_output_file(option: str, path: Path, inputs: Iterable[str] = ()) -> None:
    """Raises UserError if `path` cannot be written, or is one of the files that the command reads.

    Args:
      option: of the command line, for messages.
      inputs: files and folders that are read; names of nothing local, such as hub ids, are never the same.
    """
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UserError(f"{option}: the file's name has more than {LONGEST_NAME} bytes: choose a shorter one")
    refuse_inputs(option, path, inputs)
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file")
    if is_stream(path) and os.access(path, os.W_OK):
        return
    _check_writable(option, path.resolve() if path.is_symlink() else path)


def refuse_inputs(option: str, path: Path, inputs: Iterable[str]) -> None:
    """Raises UserError if a file that is there is one of the inputs, or lies in a folder that is one."""
    if not path.exists():
        return
    place = path.resolve()
    for name in inputs:
        given = Path(name).expanduser()
        if given.exists() and (given.samefile(path) or given.resolve() in place.parents):
            what = f"is a file of {name}, which is read" if given.is_dir() else "is the file that is read"
            raise UserError(f"{option} {path} {what}: name another")


def check_output_folder(option: str, path: Path, files: Iterable[str] = (), inputs: Iterable[str] = ()) -> None:
    """Raises UserError if `path` is a file, no files can be written there, or one of them is in the way.

    Args:
      files: names of the files that are going to be written.
      inputs: as for `check_output_file`.
    """
    inputs = list(inputs)
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: name a folder")
    led: dict[Path, str] = {}
    for name in files:
        refuse_inputs(option, path / name, inputs)
        if (other := led.setdefault((path / name).resolve(), name)) != name:
            raise UserError(f"{option} {path}: {name} and {other} lead to one file: remove the links")
        if (path / name).is_dir():
            raise UserError(f"{option} {path}: {path / name} is a folder: move it away, or name another folder")
    _check_writable(option, path / "a file")


def _check_writable(option: str, file: Path) -> None:
    """Tries whether a file can be made in the folder of `file`, or in that which the folder would be made in.

    Raises:
      UserError: says what is in the way: permissions, a full or read-only disk, a file in a folder's place.
    """
    folder = file.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is not a folder: choose another place")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise UserError(f"{option}: cannot write in {folder}: {error.strerror}; choose another place") from error
