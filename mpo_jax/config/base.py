"""What every section of the configuration is."""

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

Pairs: TypeAlias = tuple[tuple[str, float], ...]
"""How numbers by name are held: a mapping could not be hashed."""


def _as_pairs(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


NumbersByName: TypeAlias = Annotated[Pairs, BeforeValidator(_as_pairs), PlainSerializer(dict, return_type=dict)]
"""A mapping whose names the schema does not know, such as a loss's own options."""


class Section(BaseModel, frozen=True):
    """A part of the configuration: immutable, hashable, defaults checked like given values, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
