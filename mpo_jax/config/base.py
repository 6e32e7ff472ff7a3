"""What every section of the configuration is."""

import enum
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

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


class Section(BaseModel, frozen=True):
    """A part of the configuration: immutable, hashable, defaults checked like given values, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


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
