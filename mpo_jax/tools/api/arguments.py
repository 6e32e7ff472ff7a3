"""Arguments of the library that are keys of a configuration's section."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from mpo_jax.config.schema import Section
from mpo_jax.errors import UserError

S = TypeVar("S", bound=Section)


def checked(section: type[S], given: Mapping[str, Any]) -> S:
    """A configuration section from arguments.

    Raises:
      UserError: for a value that the section refuses, with the argument's name.
    """
    try:
        return section.model_validate(dict(given))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors())
        raise UserError("; ".join(problems)) from error
