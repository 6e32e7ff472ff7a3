"""What every section of the configuration is."""

import enum
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator

from mpo_jax import credentials
from mpo_jax.errors import UserError

Pairs: TypeAlias = tuple[tuple[str, float], ...]
"""How numbers by name are held: a mapping could not be hashed."""


def _as_pairs(value: Any) -> Any:
    return tuple(sorted(value.items(), key=lambda item: str(item[0]))) if isinstance(value, dict) else value


NumbersByName: TypeAlias = Annotated[Pairs, BeforeValidator(_as_pairs), PlainSerializer(dict, return_type=dict)]
"""A mapping whose names the schema does not know, such as a loss's own options."""


Options: TypeAlias = tuple[tuple[str, bool | int | float | str], ...]
"""How values by name are held."""

OptionsByName: TypeAlias = Annotated[Options, BeforeValidator(_as_pairs), PlainSerializer(dict, return_type=dict)]
"""A mapping whose names the schema does not know, such as the options of a chat template."""

Names: TypeAlias = tuple[tuple[str, str], ...]
"""How names by name are held."""

NamesByName: TypeAlias = Annotated[Names, BeforeValidator(_as_pairs), PlainSerializer(dict, return_type=dict)]
"""A mapping from names to names, such as columns by what they hold."""

BY_NAME = (Pairs, Options, Names)
"""Types of the keys below which any name may be set."""


class InRecipe(enum.Enum):
    """Marks a key, as `Annotated[type, mark]`, that is not always part of a stage's recipe.

    Attributes:
      UNLESS_DEFAULT: left out at its default: the key is newer than recipes that must keep their names.
      NEVER: what it names is hashed by content, as an input.
    """

    UNLESS_DEFAULT = enum.auto()
    NEVER = enum.auto()


HARMLESS = re.compile(rf"[\w ./-]{{0,{credentials.SHORTEST - 1}}}")
"""Texts that are too short for any credential, and no address."""


class Section(BaseModel, frozen=True):
    """A part of the configuration: immutable, hashable, defaults checked like given values, unknown keys refused.

    Raises:
      UserError: as `refuse_credentials`, wherever the values come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    IS_WHOLE: ClassVar[bool] = False
    """Whether names of its keys are complete."""

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, values: Any) -> Any:
        # no ValueError, which would be shown together with the values
        if values:
            # sections within a section were checked when they were made; a whole configuration is checked whole
            parts = values if cls.IS_WHOLE or not isinstance(values, dict) else _without_sections(values)
            refuse_credentials(parts, None if cls.IS_WHOLE else cls.__name__, known=cls.model_fields)
        return values

    @model_validator(mode="before")
    @classmethod
    def _as_they_are_meant(cls, values: Any) -> Any:
        """Refuses what Pydantic or the system would read as something else: truth values as numbers, ends of texts."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            kinds = {field.annotation, *get_args(field.annotation)} if field is not None else set()
            if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{name} is a number, not {str(value).lower()}")
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and "\0" in text:
                    raise ValueError(f"{name} holds the character NUL, which no path or text of a run may hold")
        return values

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As Pydantic's, which does not check the new values."""
        refuse_credentials(dict(update or {}), None if self.IS_WHOLE else type(self).__name__)
        return super().model_copy(update=update, deep=deep)


def recipe_values(section: Section) -> dict[str, Any]:
    """A section as plain values for a recipe, without the keys that their marks leave out."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            values[name] = recipe_values(value)
        elif InRecipe.NEVER in field.metadata or (InRecipe.UNLESS_DEFAULT in field.metadata and value == field.default):
            del values[name]
    return values


def refuse_credentials(values: Any, where: str | Path | None = None, *, known: Container[str] = ()) -> None:
    """Checks that no text in values of a configuration holds credentials: it is stored with a run, and shown.

    Args:
      values: nested mappings, lists and sections.
      where: the file or section that they come from.
      known: names of the outermost mapping that are those of keys.

    Raises:
      UserError: for an access token, a credential of the environment, or an address with a user, a password, a query or
        a fragment; names the key and not the value.
    """
    place = "" if where is None else f"{where}: "
    find: Callable[[str], str | None] | None = None
    for key, text in _texts(values, "", set(), known):
        if HARMLESS.fullmatch(text):
            continue
        # the environment is looked through only for texts that could be anything
        find = find or credentials.finder()
        if (what := find(text)) is not None:
            raise UserError(
                f"{place}{key} holds {what}, and a run stores and shows its configuration: take it out (of an address "
                "leave the bare one), and give keys and tokens as the environment variables of the service (such as "
                "HF_TOKEN, WANDB_API_KEY, AWS_PROFILE)"
            )


def _without_sections(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, Section)}


def _texts(value: Any, key: str, seen: set[int], known: Container[str] = ()) -> Iterator[tuple[str, str]]:
    """All strings with their keys; a name in a mapping has that of the mapping.

    Args:
      seen: gets what was looked through, since YAML's aliases can make a million places of one list.
    """
    if isinstance(value, str):
        yield key, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping | BaseModel):
        for name, part in dict(value).items():
            if name not in known:
                yield f"a name in {key}" if key else "a name", str(name)
            yield from _texts(part, f"{key}.{name}".removeprefix("."), seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for number, part in enumerate(value):
            yield from _texts(part, f"{key}[{number}]", seen)
