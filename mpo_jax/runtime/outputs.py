"""Checks of what a command is going to write, before it reads or computes anything."""

import os
from collections.abc import Iterable
from pathlib import Path

from mpo_jax.errors import UserError


def check_output_file(option: str, path: Path, inputs: Iterable[str] = ()) -> None:
    """Raises UserError if `path` cannot be written, or is one of the files that the command reads.

    Args:
      option: of the command line, for messages.
      inputs: files that are read; names that are no local files, such as hub ids, are never the same.
    """
    for name in inputs:
        given = Path(name).expanduser()
        if given.exists() and path.exists() and given.samefile(path):
            raise UserError(f"{option} {path} is the file that is read: name another")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file")
    _check_writable(option, path)


def check_output_folder(option: str, path: Path) -> None:
    """Raises UserError if `path` is a file, or no files can be written there."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: name a folder")
    _check_writable(option, path / "a file")


def _check_writable(option: str, file: Path) -> None:
    """Raises UserError if the folder of a file cannot be written, or be made."""
    folder = file.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is a file, not a folder: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option}: no permission to write in {folder}: choose another place")
