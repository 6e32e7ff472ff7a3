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


def distinct_by_seed(by_seed: BySeed, stage: str) -> dict[int, list[tuple[Artifact, tuple[str, ...]]]]:
    """The same for every seed; an artifact that seeds share is the first one's."""
    found: dict[int, list[tuple[Artifact, tuple[str, ...]]]] = {}
    seen: set[str] = set()
    for seed, results in by_seed.items():
        found[seed] = [one for one in distinct(results, stage) if one[0].id not in seen]
        seen |= {artifact.id for artifact, _ in found[seed]}
    return found


def stage_series(by_seed: BySeed, stage: str) -> list[Series]:
    """A stage's curves: artifacts of several seeds are twins where the same runs use them, in the same order."""
    twins: dict[tuple[tuple[str, ...], int], list[list[dict[str, Any]]]] = {}
    for artifacts in distinct_by_seed(by_seed, stage).values():
        seen: dict[tuple[str, ...], int] = {}
        for artifact, runs in artifacts:
            number = seen[runs] = seen.get(runs, -1) + 1
            twins.setdefault((runs, number), []).append(metrics(artifact))
    return [Series(runs, tuple(lines)) for (runs, _), lines in twins.items()]


def metrics(artifact: Artifact) -> list[dict[str, Any]]:
    """What a stage logged; nothing where it logs nothing, or where the file is damaged, of which the run warns."""
    with contextlib.suppress(Damaged):
        return read_metrics(artifact.path) if (artifact.path / METRICS).exists() else []
    return []
