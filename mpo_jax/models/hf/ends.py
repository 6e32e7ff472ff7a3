"""The tokens that end a response: the tokenizer's EOS, and those that a model's generation_config.json adds."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.untrusted import read_json

FILE, KEY = "generation_config.json", "eos_token_id"


def read_end_ids(folder: Path) -> list[int]:
    """The end tokens that a folder lists, as transformers finds them: of generation_config.json, else of config.json.

    A single id in config.json does not count: where it is left out, it is the default of the architecture.

    Raises:
      UserError: if the file is broken, or they are no ids.
    """
    path = folder / FILE
    value = _value(path)
    if not path.is_file():
        path = folder / "config.json"
        value = _value(path)
        value = value if isinstance(value, list) else None
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{path}: {KEY}={value!r} must be a token's id, or a list of them")
    return list(dict.fromkeys(ids))


def write_end_ids(folder: Path, ids: list[int], *, bos_id: int | None, pad_id: int | None) -> None:
    """Writes the generation_config.json of a model with several end tokens, which transformers stops at too."""
    values = {KEY: ids, "bos_token_id": bos_id, "pad_token_id": pad_id}
    known = {key: value for key, value in values.items() if value is not None}
    (folder / FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def attach_end_ids(tokenizer: Any, folder: Path) -> None:
    """Lets a tokenizer carry the end tokens that its folder lists.

    Raises:
      UserError: as `read_end_ids`, or if one is none of the tokenizer's ids.
    """
    ids = read_end_ids(folder)
    # above 32 bits the tokenizer's own code raises another error
    if unknown := [i for i in ids if i.bit_length() > 31 or tokenizer.convert_ids_to_tokens(i) is None]:
        raise UserError(f"{folder}: {FILE} or config.json has {KEY}={unknown[0]}, but the tokenizer has no such id")
    tokenizer.listed_end_ids = tuple(ids)
    if (note := contradiction(folder)) is not None:
        _say_once(note)


def contradiction(folder: Path) -> str | None:
    """What the two files of a folder say against each other, and which one counts; None if one's ids hold the other's.

    Raises:
      UserError: if a file is broken.
    """
    given, other = (_value(folder / name) for name in (FILE, "config.json"))
    if given is None or other is None:
        return None
    one, two = (value if isinstance(value, list) else [value] for value in (given, other))
    if all(i in two for i in one) or all(i in one for i in two):
        return None
    return f"{folder}: {FILE} has {KEY}={given} and config.json {other}: responses end as {FILE} says"


@lru_cache(maxsize=64)
def _say_once(note: str) -> None:
    console.print(f"  {note}", soft_wrap=True, markup=False)


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """All ids that end a response: EOS first, which data are given, then the listed ones."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys([*own, *sorted(getattr(tokenizer, "listed_end_ids", ()))]))


def _value(path: Path) -> Any:
    if not path.exists():
        return None
    return read_json(path).get(KEY)
