"""The reward model's calibration in the report: Figure 2, reliability, ECE, and the effect of thresholds."""

import numpy as np

from mpo_jax.data.pair_table import FILE, PairTable
from mpo_jax.evaluation.calibration import against_truth, by_threshold, read_gaps, reliability
from mpo_jax.selection import ordered_right
from mpo_jax.stages.select import THRESHOLDS
from mpo_jax.tools.report.seeds import BySeed, Rows
from mpo_jax.types import Artifact

LABELLED = "held-out pairs against their labels"
HELD_OUT_TRUTH = "held-out pairs against the truth"


def signed_gaps(by_seed: BySeed) -> dict[str, np.ndarray]:
    """Gaps of each source of pairs, positive where the reward model is right; all reward models' together.

    Sources without a truth, such as sampled pairs of real data, are left out, and so are reward models without stored
    gaps.
    """
    found: dict[str, list[np.ndarray]] = {}
    every = [result for results in by_seed.values() for result in results]
    # seeds may share their reward model
    artifacts = {artifact.id: (artifact, result) for result in every for artifact in result.artifacts.values()}
    for artifact, result in artifacts.values():
        for name, gaps in _of_artifact(artifact, result.config.select.pair_source).items():
            if len(gaps):
                found.setdefault(name, []).append(gaps)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _of_artifact(artifact: Artifact, pair_source: str) -> dict[str, np.ndarray]:
    if artifact.manifest["stage"] == "reward" and (kept := read_gaps(artifact.path)) is not None:
        gap, truth = kept
        return {LABELLED: gap} | ({} if truth is None else {HELD_OUT_TRUTH: against_truth(gap, truth)})
    if artifact.manifest["stage"] == "select" and (artifact.path / FILE).is_file():
        table = PairTable.read(artifact.path)
        name = {"sampled": "sampled", "human": "labelled", "scored": "scored"}[pair_source]
        return {f"{name} pairs against the truth": against_truth(table.gap, table.truth)}
    return {}


def reliability_rows(gaps: dict[str, np.ndarray]) -> tuple[Rows, Rows]:
    """The bins of every source's reliability curve, and a row a source with its error."""
    curve: Rows = []
    errors: Rows = []
    for name, signed in gaps.items():
        bins, error = reliability(signed)
        curve += [{"pairs": name, **one} for one in bins]
        accuracy = float(ordered_right(signed).mean())
        errors.append({"pairs": name, "count": len(signed), "accuracy": accuracy, "expected_calibration_error": error})
    return curve, errors


def used_thresholds(by_seed: BySeed) -> tuple[float, ...]:
    """The thresholds by which any run split its pairs; shares of easy pairs name none that all seeds share."""
    selects = [result.config.select for results in by_seed.values() for result in results]
    return tuple({s.threshold for s in selects if s.easy_fraction is None and s.threshold is not None})


def threshold_rows(gaps: dict[str, np.ndarray], used: tuple[float, ...] = ()) -> Rows:
    """The effect of thresholds on every source of pairs: the usual ones and those that were used."""
    thresholds = sorted({*THRESHOLDS, *used})
    return [{"pairs": name, **row} for name, signed in gaps.items() for row in by_threshold(signed, thresholds)]
