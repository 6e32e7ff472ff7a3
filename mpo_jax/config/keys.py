"""The configuration's keys, read off its schema: for `mpo config --keys` and for configs/README.md."""

import dataclasses
import difflib
import json
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mpo_jax.config.base import BY_NAME, Names, Options, Pairs, Section
from mpo_jax.config.old_keys import refuse_old_keys
from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError

TYPE_COLUMN = 22
"""Characters after which a type and its default no longer push the descriptions of other keys to the right."""

MIN_TEXT = 40
"""Characters that a description needs beside the names; on narrower terminals it goes below them."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
      name: dotted, from the root.
      type: as a reader writes it, such as `int or null`.
      default: as YAML, and the stage's own where stages differ.
      constraint: the allowed range, such as `in [0, 1]`; empty if there is none.
    """

    name: str
    type: str
    default: str
    constraint: str
    description: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A section at one place in the configuration; the root has the name "".

    Attributes:
      kind: its class, which several places may share.
      keys: its own, without those of the sections inside it.
    """

    name: str
    kind: type[Section]
    keys: tuple[Key, ...]

    @property
    def purpose(self) -> str:
        return " ".join((self.kind.__doc__ or "").split())


def parts(section: Section | None = None, name: str = "") -> Iterator[Part]:
    """The sections in the order of the schema, each before those inside it.

    Args:
      section: where to start, with the defaults to show; None for the whole configuration.
      name: its dotted name.
    """
    section = Config() if section is None else section
    prefix = f"{name}." if name else ""
    own, inner = [], []
    for field, info in type(section).model_fields.items():
        value, kind = getattr(section, field), _section(info)
        if kind is None or not isinstance(value, Section):
            own.append(_key(prefix + field, info, value))
        if kind is not None:
            inner.append((value if isinstance(value, Section) else kind(), prefix + field))
    yield Part(name, type(section), tuple(own))
    for value, place in inner:
        yield from parts(value, place)


def find_keys(section: str | None = None) -> list[Key]:
    """All keys, or those of a section at any depth, or the one key of that name.

    Raises:
      UserError: if there is no such section or key; it names the nearest one.
    """
    every = [key for part in parts() for key in part.keys]
    if section is None:
        return every
    found = [key for key in every if f"{key.name}.".startswith(f"{section}.")]
    if not found:
        refuse_old_keys([section], "the command line")
        names = [part.name for part in parts() if part.name]
        near = difflib.get_close_matches(section, [*names, *(key.name for key in every)], n=1, cutoff=0.5)
        top = ", ".join(name for name in names if "." not in name)
        raise UserError(
            f"no section or key of the configuration is called {section}"
            + (f"; did you mean {near[0]}?" if near else f"; its sections are {top}")
        )
    return found


def listing(section: str | None = None, width: int | None = None) -> str:
    """The keys as text, `name  type = default  constraint  description`, with a blank line between sections.

    Args:
      section: as for `find_keys`.
      width: of the terminal, in characters; None: one line per key, however long.

    Raises:
      UserError: as for `find_keys`.
    """
    found = find_keys(section)
    name_width = max(len(key.name) for key in found)
    typed = [f"{key.type} = {key.default}" for key in found]
    type_width = max((len(one) for one in typed if len(one) <= TYPE_COLUMN), default=0)
    lines, above = [], None
    for key, one in zip(found, typed, strict=True):
        place = key.name.rpartition(".")[0]
        if above is not None and place != above:
            lines.append("")
        above = place
        rest = [*filter(None, [key.constraint, key.description])]
        head = f"{key.name:<{name_width}}  "
        beside = "  ".join([f"{one:<{type_width}}", *rest])
        if width is None:
            lines.append(head + beside)
        elif width - len(head) >= MIN_TEXT:
            lines += _wrapped(beside, width, head, " " * (len(head) + 2))
        else:
            lines += [key.name, *_wrapped("  ".join([one, *rest]), max(width, MIN_TEXT), "    ", "    ")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _section(info: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or may hold; None for a plain value."""
    kinds = (info.annotation, *get_args(info.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _key(name: str, info: FieldInfo, default: Any) -> Key:
    shown = json.dumps(dict(default)) if info.annotation in BY_NAME else _value(default)
    return Key(name, _type(info.annotation), shown, _constraint(info), info.description or "")


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(_value, args))
    if annotation == Pairs:
        return "numbers by name"
    if annotation == Options:
        return "values by name"
    if annotation == Names:
        return "names by name"
    if origin is tuple:
        return f"list of {_type(args[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type, sorted(args, key=lambda one: one is type(None))))
    if annotation is type(None):
        return "null"
    return "section" if issubclass(annotation, Section) else annotation.__name__


def _value(value: Any) -> str:
    """The value as YAML in one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-").replace("e+", "e")
    return json.dumps(value, ensure_ascii=False)


def _constraint(info: FieldInfo) -> str:
    """The range of a number; patterns are for the description to put into words."""
    names = ("gt", "ge", "lt", "le")
    bounds = {name: getattr(one, name) for one in info.metadata for name in names if hasattr(one, name)}
    low = next((name for name in ("gt", "ge") if name in bounds), None)
    high = next((name for name in ("lt", "le") if name in bounds), None)
    if low and high:
        left, right = "(" if low == "gt" else "[", ")" if high == "lt" else "]"
        return f"in {left}{_value(bounds[low])}, {_value(bounds[high])}{right}"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return next((f"{signs[name]} {_value(value)}" for name, value in bounds.items()), "")
