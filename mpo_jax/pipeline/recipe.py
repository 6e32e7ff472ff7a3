"""What an artifact is made from, and the name that follows from it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mpo_jax.types import Artifact

FORMAT = 5
"""Raise it when what a stage computes or writes changes: artifacts of another format are not reused."""

RECIPE = "recipe.json"
"""In an unfinished stage's folder: what it is made from. The manifest of a finished one says the same."""


def make_recipe(
    stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], parents: Mapping[str, Artifact]
) -> dict[str, Any]:
    """All that a stage's result depends on.

    Args:
      settings: the stage's, as plain values.
      inputs: fingerprints of what it reads that is no artifact.
      parents: the artifacts that it reads, by role.
    """
    return {
        "format": FORMAT,
        "stage": stage,
        "settings": settings,
        "inputs": inputs,
        "parents": {role: parent.id for role, parent in parents.items()},
    }


def artifact_name(recipe: Mapping[str, Any]) -> str:
    """`<stage>-<hash>`: the folder of what this recipe makes."""
    return f"{recipe['stage']}-{hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]}"
