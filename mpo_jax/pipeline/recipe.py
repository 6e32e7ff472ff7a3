"""The recipe of an artifact (everything its content depends on), the name derived from it, and its manifest."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from mpo_jax.errors import Damaged
from mpo_jax.runtime.files import anew, read_object
from mpo_jax.types import Artifact

FORMAT = 6
"""Increment it when a change affects what a stage computes or writes: artifacts of another format are not reused."""

RECIPE = "recipe.json"
"""File with the recipe in an unfinished stage's folder; once finished, the manifest contains it."""

MANIFEST = "manifest.json"
"""File in a finished stage's folder: the recipe, what the stage measured, and how it was made."""


_NAME = re.compile(r"\w+-[0-9a-f]{12}|\.\w+-[0-9a-f]{12}\.partial")


class _Bin(BaseModel, strict=True):
    low: float
    high: float | None
    count: int
    share: float
    accuracy: float | None


class _Summary(BaseModel, strict=True, extra="allow"):
    """Of what a stage measured, what reports read without asking for its type."""

    held_out_accuracy: float | None = None
    longer_is_chosen: float | None = None
    true_accuracy: float | None = None
    label_accuracy: float | None = None
    accuracy_by_gap: list[_Bin] | None = None
    true_accuracy_by_gap: list[_Bin] | None = None
    data: list[dict[str, Any]] = []
    tokens: dict[str, Any] = {}


class _Shape(BaseModel, strict=True):
    """The types of what a recipe or manifest says, where it says it."""

    stage: str
    parents: dict[str, str]
    settings: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    summary: _Summary = _Summary()
    seconds: Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)] | None = None
    warnings: list[str] = []
    removed: list[str] = []


def make_recipe(
    stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], parents: Mapping[str, Artifact]
) -> dict[str, Any]:
    """Everything a stage's result depends on.

    Args:
      settings: the stage's settings, as plain values.
      inputs: fingerprints of the inputs that are not artifacts.
      parents: artifacts that the stage reads, by role.
    """
    return {
        "format": FORMAT,
        "stage": stage,
        "settings": settings,
        "inputs": inputs,
        "parents": {role: parent.id for role, parent in parents.items()},
    }


def artifact_name(recipe: Mapping[str, Any]) -> str:
    """`<stage>-<hash>`: the folder name of this recipe's artifact."""
    return f"{recipe['stage']}-{hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]}"


def is_stage_folder(folder: Path) -> bool:
    """Whether a folder is named like a finished or an unfinished stage and lies where they do."""
    return folder.absolute().parent.name == "stages" and _NAME.fullmatch(folder.name) is not None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
      Damaged: if it is missing, damaged, or of another shape.
    """
    return _read(folder / MANIFEST)


def read_recipe(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage, or the recipe of an unfinished one; errors as those of `read_manifest`."""
    return _read(folder / (RECIPE if (folder / RECIPE).is_file() else MANIFEST))


def read_made(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the finished stage with this recipe, by the folder that has its name; None if there is nothing.

    Raises:
      Damaged: if something else is there, since a stage that is made could not get its name.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        raise Damaged(folder, "is no folder", "delete it, and the next run makes the stage anew")
    found = read_manifest(folder)
    if changed := [key for key, value in json.loads(json.dumps(recipe)).items() if found.get(key) != value]:
        raise Damaged(folder / MANIFEST, f"was changed: its {', '.join(changed)} gives another name", anew(folder))
    return found


def _read(path: Path) -> dict[str, Any]:
    advice = anew(path.parent)
    found = read_object(path, advice)
    try:
        _Shape.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Damaged(path, f"is damaged ({place}: {first['msg']})", advice) from None
    return found
