"""A Python function of the user's as reward: found by its name, called with texts, checked."""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.data.text_rows import TextRow
from mpo_jax.errors import UserError
from mpo_jax.runtime.processes import agree, is_main

SHOWN_CHARACTERS = 60
FAILURES = (Exception, SystemExit)
"""How code of the user's can fail; Ctrl-C is not its failure."""


class RewardFunction:
    """The function that `reward.function` names.

    It gets two lists, prompts and responses, and returns a finite number for each. A prompt is a string as the data
    has it, or of a conversation its turns as a list of {"role", "content"}, where there are such with "tool_calls", and
    with "tools" in the first one. It must be deterministic: what it has
    returned is kept, and what a kill has lost is asked for again.

    Args:
      name: module:name.

    Raises:
      UserError: if there is no such module or function, or importing it fails.
    """

    def __init__(self, name: str):
        self.name, self.fingerprint = name, fingerprint_function(name)
        module, _, attribute = name.partition(":")
        try:
            with contextlib.chdir("."):  # left again: relative paths of the configuration are meant from here
                found: Any = importlib.import_module(module)
        except FAILURES as error:
            raise UserError(f"{self}: importing {module} fails: {_place(error)}{_reason(error)}") from error
        try:
            for part in attribute.split("."):
                found = getattr(found, part)
        except AttributeError:
            raise UserError(f"{self}: {module} has no {attribute}") from None
        if not callable(found):
            raise UserError(f"{self} is no function but {type(found).__name__}")
        self._function: Callable[..., Any] = found

    def __str__(self) -> str:
        return f"reward.function={self.name}"

    def __call__(self, rows: Sequence[TextRow]) -> np.ndarray:
        """[rows] float32, the same in every process: process 0 calls the function.

        Raises:
          UserError: if it fails, or returns something else than a finite number for each row.
        """
        found = self._checked(rows).tolist() if is_main() else []
        return np.asarray(agree(found, str(self)), np.float32)

    def _checked(self, rows: Sequence[TextRow]) -> np.ndarray:
        try:
            returned = self._call(rows)
        except FAILURES as error:
            place = _place(error)
            raise UserError(f"{self} fails at {_shown(self._first_failing(rows))}: {place}{_reason(error)}") from error
        try:
            if isinstance(returned, Mapping | Set | str | bytes):
                raise TypeError("its values are no numbers in the order of the responses")
            values = [_number(value) for value in returned]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self} must return a list of numbers, one for each response; for {len(rows)} responses, the first "
                f"at {_shown(rows[0])}, it returned {type(returned).__name__}: {_reason(error)}"
            ) from error
        if len(values) != len(rows):
            raise UserError(
                f"{self} returned {len(values)} numbers for {len(rows)} responses, the first at {_shown(rows[0])}: it "
                "must return one for each"
            )
        with np.errstate(over="ignore"):
            scores = np.asarray(values, np.float32)
        for row, value, score in zip(rows, values, scores, strict=True):
            if not np.isfinite(score):
                raise UserError(f"{self} returned {value} at {_shown(row)}: it must return finite float32 numbers")
        return scores

    def _call(self, rows: Sequence[TextRow]) -> Any:
        prompts = [row.prompt if isinstance(row.prompt, str) else [dict(turn) for turn in row.prompt] for row in rows]
        with contextlib.chdir("."):  # as for the import
            returned = self._function(prompts, [row.response for row in rows])
            # a generator runs the user's code as it is read
            return list(returned) if isinstance(returned, Iterator) else returned

    def _first_failing(self, rows: Sequence[TextRow]) -> TextRow:
        """The first row that fails by itself; the first of all if none does."""
        for row in rows:
            try:
                self._call([row])
            except FAILURES:
                return row
        return rows[0]


def _number(value: Any) -> float:
    """A number as float; infinite where it is too large for one."""
    if isinstance(value, str | bytes) or np.iscomplexobj(value):
        raise TypeError(f"{value!r} is no number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


@lru_cache
def load_function(name: str) -> RewardFunction:
    """`RewardFunction(name)`, imported once."""
    return RewardFunction(name)


def fingerprint_function(name: str) -> str:
    """A hash of the function's name and of its module's file, which is read and not run.

    Packages around the module are imported; other modules that it imports do not count.

    Raises:
      UserError: if the name has another form, or there is no such file.
    """
    module, found, attribute = name.partition(":")
    if not (found and module and attribute):
        raise UserError(f"reward.function={name}: give module:name, such as rewards:brevity")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # as for `python -m`; an installed command has only its own folder there
        sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # packages around it are imported
        raise UserError(f"reward.function={name}: importing what holds {module} fails: {_reason(error)}") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(
            f"reward.function={name}: no file of a module {module} in the current folder ({here}) or on the Python path"
        )
    return hashlib.sha256(json.dumps([name, _digest(Path(spec.origin))]).encode()).hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _shown(row: TextRow) -> str:
    def short(text: str) -> str:
        return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")

    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"] if row.prompt else ""
    return f"the prompt {short(prompt)} with the response {short(row.response)}"


def _place(error: BaseException) -> str:
    """The last file and line of the user's own that an error passed through; nothing if it met none."""
    files = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    library = Path(sysconfig.get_paths()["stdlib"])
    own = [
        f"{file}:{line}: "
        for file, line in files
        if file.is_file()
        and file != Path(__file__)
        and library not in file.parents
        and "site-packages" not in file.parts
    ]
    return own[-1] if own else ""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
