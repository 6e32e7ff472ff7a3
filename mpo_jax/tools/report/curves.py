"""The logged metrics of a stage's artifacts, those of several seeds side by side."""

import contextlib
from typing import Any

from mpo_jax.errors import Damaged
from mpo_jax.tools.report.figures import Series
from mpo_jax.tools.report.results import METRICS, RunResult, read_metrics
from mpo_jax.tools.report.seeds import BySeed
from mpo_jax.types import Artifact


def distinct(results: list[RunResult], stage: str) -> list[tuple[Artifact, tuple[str, ...]]]:
    """A stage's artifacts, each once, with the names of the runs that use it."""
    found: dict[str, tuple[Artifact, tuple[str, ...]]] = {}
    for result in results:
        for artifact in result.artifacts.values():
            if artifact.manifest["stage"] == stage:
                users = found[artifact.id][1] if artifact.id in found else ()
                found[artifact.id] = artifact, (*users, result.name)
    return list(found.values())


def stage_series(by_seed: BySeed, stage: str) -> list[Series]:
    """A stage's curves: artifacts of several seeds are twins where the same runs use them, in the same order."""
    twins: dict[tuple[tuple[str, ...], int], list[list[dict[str, Any]]]] = {}
    for results in by_seed.values():
        seen: dict[tuple[str, ...], int] = {}
        for artifact, runs in distinct(results, stage):
            number = seen[runs] = seen.get(runs, -1) + 1
            twins.setdefault((runs, number), []).append(metrics(artifact))
    return [Series(runs, tuple(lines)) for (runs, _), lines in twins.items()]


def metrics(artifact: Artifact) -> list[dict[str, Any]]:
    """What a stage logged; nothing where it logs nothing, or where the file is damaged, of which the run warns."""
    with contextlib.suppress(Damaged):
        return read_metrics(artifact.path) if (artifact.path / METRICS).exists() else []
    return []
