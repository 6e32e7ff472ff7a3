"""The recipe of an artifact (everything its content depends on) and the name derived from it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mpo_jax.types import Artifact

FORMAT = 6
"""Increment it when a change affects what a stage computes or writes: artifacts of another format are not reused."""

RECIPE = "recipe.json"
"""File with the recipe in an unfinished stage's folder; once finished, the manifest contains it."""


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
