"""The reward model's calibration in the report: Figure 2, reliability, ECE, and the effect of thresholds."""

from collections.abc import Mapping, Sequence

import numpy as np

from mpo_jax.data.pair_table import FILE, PairTable
from mpo_jax.evaluation.calibration import against_truth, by_threshold, read_gaps, reliability
from mpo_jax.selection import ordered_right
from mpo_jax.stages.select import THRESHOLDS
from mpo_jax.tools.report.results import AT_SPLITS, split_label
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


def used_thresholds(by_seed: BySeed) -> dict[float, list[str]]:
    """The gaps at which runs split their pairs, each with its splits; that of a share of easy pairs is a seed's own."""
    found: dict[float, dict[str, None]] = {}
    for seed, results in by_seed.items():
        for result in [result for result in results if result.experiment in AT_SPLITS]:
            select, pairs = result.config.select, result.artifacts.get("select")
            label = split_label(select)
            if select.easy_fraction is None:
                assert select.threshold is not None
                found.setdefault(select.threshold, {})[label] = None
            elif pairs is not None and (pairs.path / FILE).is_file():
                own = f"{label}, seed {seed}" if len(by_seed) > 1 else label
                found.setdefault(PairTable.read(pairs.path).threshold(select), {})[own] = None
    return {threshold: [*labels] for threshold, labels in found.items()}


def threshold_rows(gaps: dict[str, np.ndarray], used: Mapping[float, Sequence[str]]) -> Rows:
    """The effect of thresholds on every source of pairs: the usual ones and those that were used, which are named."""
    rows: Rows = []
    for name, signed in gaps.items():
        for row in by_threshold(signed, sorted({*THRESHOLDS, *used})):
            split = "; ".join(used.get(row["threshold"], ())) or None
            rows.append({"pairs": name, "threshold": row["threshold"], "split": split, **row})
    return rows
