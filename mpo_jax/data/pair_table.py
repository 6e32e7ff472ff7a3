"""The table of scored response pairs: written by selection, read by DPO, PPO and the report."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mpo_jax.config.registry import Subset
from mpo_jax.errors import NothingSelected
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.selection import split, threshold_for_fraction

FILE = "pairs.parquet"


class Border(Protocol):
    """The split between easy and hard pairs; exactly one of the two is set."""

    @property
    def threshold(self) -> float | None: ...

    @property
    def easy_fraction(self) -> float | None: ...


@dataclasses.dataclass(frozen=True)
class PairTable:
    """All pairs in prompt order; the sides of row i are `response[i][0]` and `response[i][1]`.

    Attributes:
      prompt: N texts.
      response: [N, 2] texts; side 0 is the first sample, or the human-preferred response.
      ids: [N][2] token ids of the responses as sampled, with EOS if one was sampled.
      score: [N, 2] raw reward-model scores.
      chosen: [N] index of the chosen side.
      gap: [N] score of the chosen side minus the other's; negative only if a human label contradicts the scores.
      utility: [N, 2] true utilities, NaN if unknown.
    """

    prompt: list[str]
    response: list[tuple[str, str]]
    ids: list[tuple[list[int], list[int]]]
    score: np.ndarray
    chosen: np.ndarray
    gap: np.ndarray
    utility: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    def write(self, folder: Path) -> None:
        """Writes `pairs.parquet`."""
        columns: dict[str, Any] = {"prompt": self.prompt}
        for side in (0, 1):
            columns[f"response_{side}"] = [pair[side] for pair in self.response]
            columns[f"ids_{side}"] = [pair[side] for pair in self.ids]
            columns[f"score_{side}"] = self.score[:, side]
            columns[f"utility_{side}"] = self.utility[:, side]
        columns |= {"chosen": self.chosen, "gap": self.gap}
        pq.write_table(pa.table(columns), folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "PairTable":
        table = pq.read_table(folder / FILE).to_pydict()
        both = lambda name: zip(table[f"{name}_0"], table[f"{name}_1"], strict=True)  # noqa: E731
        return cls(
            prompt=table["prompt"],
            response=list(both("response")),
            ids=list(both("ids")),
            score=np.asarray(list(both("score")), np.float32).reshape(-1, 2),
            chosen=np.asarray(table["chosen"], np.int32),
            gap=np.asarray(table["gap"], np.float32),
            utility=np.asarray(list(both("utility")), np.float64).reshape(-1, 2),
        )

    def threshold(self, border: Border) -> float:
        """The configured threshold, or the one that gives the configured easy fraction."""
        return _threshold(self.gap, border)

    def rows(self, subset: Subset, border: Border) -> np.ndarray:
        """Indices of the easy, the hard or all rows. Warns if the other side of the split is empty.

        Raises:
          NothingSelected: if the subset is empty, with the range of the gaps.
        """
        rows = _rows(self.gap, subset, border)
        if subset != "all":
            self.warn_if_one_sided(border)
        return rows

    def warn_if_one_sided(self, border: Border) -> None:
        """Warns if the configured split leaves the easy or the hard side empty."""
        sides: tuple[Subset, Subset] = ("easy", "hard")
        for side in sides:
            try:
                _rows(self.gap, side, border)
            except NothingSelected as error:
                warn(str(error))

    @property
    def truth(self) -> np.ndarray:
        """[N] true utility of the chosen side minus the other's, NaN if unknown."""
        return np.where(self.chosen == 0, 1, -1) * (self.utility[:, 0] - self.utility[:, 1])

    def label_accuracy(self, rows: np.ndarray) -> float | None:
        """Fraction of rows whose chosen side has the higher true utility, ties excluded; None if none is known."""
        signed = self.truth[rows]
        decided = np.isfinite(signed) & (signed != 0)
        return float((signed[decided] > 0).mean()) if decided.any() else None


def check_subsets(folder: Path, subsets: Iterable[Subset], border: Border) -> None:
    """Raises NothingSelected if a subset of the table in `folder` is empty; reads only the gaps."""
    gap_N = pq.read_table(folder / FILE, columns=["gap"])["gap"].to_numpy()
    for subset in subsets:
        _rows(gap_N, subset, border)


def _threshold(gap_N: np.ndarray, border: Border) -> float:
    if border.easy_fraction is not None:
        return threshold_for_fraction(gap_N, border.easy_fraction)
    assert border.threshold is not None
    return border.threshold


def _rows(gap_N: np.ndarray, subset: Subset, border: Border) -> np.ndarray:
    if subset == "all":
        return np.arange(len(gap_N))
    threshold = _threshold(gap_N, border)
    easy_N = np.asarray(split(gap_N, threshold))
    rows = np.flatnonzero(easy_N if subset == "easy" else ~easy_N)
    if not len(rows):
        raise NothingSelected(
            f"no pair is {subset} at threshold {threshold:g}: gaps run from {gap_N.min():.3g} to "
            f"{gap_N.max():.3g} (median {np.median(gap_N):.3g}); "
            f"{'lower' if subset == 'easy' else 'raise'} select.threshold, or set select.easy_fraction"
        )
    return rows
