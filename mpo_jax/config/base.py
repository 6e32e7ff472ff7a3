"""What every section of the configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel, frozen=True):
    """A part of the configuration: immutable, hashable, defaults checked like given values, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
