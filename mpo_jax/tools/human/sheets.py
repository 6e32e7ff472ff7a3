"""A study: the pairs that people see, the side of each answer, and the key with the sides."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import Pair
from mpo_jax.untrusted import loads, read_text

FORMAT = 1
CHECKSUM = "sha256"
Side = Literal["left", "right"]
Choice = Literal["left", "right", "tie"]
CUT = "[\N{HORIZONTAL ELLIPSIS}]"
"""Stands where a prompt was cut."""
BEGINNING = 20
"""Characters by which a text is known to be the beginning of another."""
CHOICES: tuple[Choice, ...] = ("left", "right", "tie")


@dataclasses.dataclass(frozen=True)
class Item:
    """A question to people.

    Attributes:
      number: from 1, in the order of the sheet.
      prompt: as both sides saw it.
      left, right: the responses on the two sides.
      a_is: the side of A's response; part of the key, and on no sheet.
      category: if the study has categories; on no sheet, since it might bias the choice.
    """

    number: int
    prompt: str
    left: str
    right: str
    a_is: Side
    category: str | None


@dataclasses.dataclass(frozen=True)
class Study:
    """All items of a study.

    Attributes:
      a, b: the user's names of the two sides.
      seed: of the choice of items, their order and their sides.
    """

    a: str
    b: str
    seed: int
    items: tuple[Item, ...]

    @property
    def id(self) -> str:
        """12 digits of sha256 over all texts of the sheets."""
        shown = [(item.prompt, item.left, item.right) for item in self.items]
        return hashlib.sha256(json.dumps([FORMAT, shown]).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The key, with a checksum over all of it: sides that were flipped would turn every verdict around."""
        key = {"format": FORMAT, "study": self.id, **dataclasses.asdict(self)}
        return {**key, CHECKSUM: _checksum(key)}


def _checksum(key: Mapping[str, Any]) -> str:
    """sha256 over all that the key says besides."""
    rest = {name: value for name, value in key.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def make_study(pairs: Sequence[Pair], names: tuple[str, str], *, n: int | None, by: str | None, seed: int) -> Study:
    """Draws n pairs, or n of each category, shuffles them, and puts A on the left in half of each category.

    Args:
      n: None: all pairs.
      by: the field of the categories to draw from; None: n pairs of all.

    Raises:
      UserError: if a category has fewer than n pairs, or if a pair has no category though `by` is given.
    """
    groups: dict[str | None, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.category if by is not None else None, []).append(pair)
    if by is not None and None in groups:
        raise UserError(
            f"--by {by}: {len(groups[None])} of {len(pairs)} pairs have no field {by!r}, such as the prompt "
            f"{groups[None][0].prompt[:60]!r}: add it to the rows of A or B, or to those of --data"
        )
    if n is not None and (few := {name: len(group) for name, group in groups.items() if len(group) < n}):
        counts = ", ".join(f"{name or 'all pairs'}: {count}" for name, count in few.items())
        raise UserError(f"--n {n} is more than there are ({counts}): take fewer")
    rng = np.random.default_rng(seed)
    drawn: list[tuple[Pair, Side]] = []
    for name in sorted(groups, key=str):
        chosen = rng.permutation(len(groups[name]))[:n]
        # balanced to within one, and the side with one more is random
        sides = (np.arange(len(chosen)) + rng.integers(2)) % 2
        for index, side in zip(chosen, rng.permutation(sides), strict=True):
            drawn.append((groups[name][index], "right" if side else "left"))
    items = []
    for number, place in enumerate(rng.permutation(len(drawn)), 1):
        pair, a_is = drawn[place]
        left, right = (pair.a, pair.b) if a_is == "left" else (pair.b, pair.a)
        items.append(Item(number, _shown(pair), left, right, a_is, pair.category))
    return Study(*names, seed, tuple(items))


def _shown(pair: Pair) -> str:
    """The prompt as people see it: a mark stands where it was cut to fit the models, which is at its beginning."""
    begins = pair.seen.lstrip()[:BEGINNING]
    is_cut = len(pair.seen) < len(pair.prompt) and begins not in pair.prompt.lstrip()[: 2 * BEGINNING]
    return f"{CUT} {pair.seen.lstrip()}" if is_cut else pair.seen


def read_key(path: Path) -> Study:
    """The study of a key file.

    Raises:
      UserError: if it is no key, or if any text of the sheets was changed in it.
    """
    if not path.exists():
        raise UserError(f"no key {path}: name the key.json of `mpo human export` with --key FILE")
    text = read_text(path)
    try:
        found = loads(text)
        study = Study(found["a"], found["b"], found["seed"], tuple(Item(**item) for item in found["items"]))
        right = found["study"] == study.id and all(item.a_is in ("left", "right") for item in study.items)
        # keys of earlier versions have none
        right = right and found.get(CHECKSUM, _checksum(found)) == _checksum(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no key of a study: name the key.json of `mpo human export` with --key") from error
    if not right or not study.items:
        raise UserError(f"{path} was changed after it was written, so sheets cannot be matched to it: restore it")
    return study
