"""The table of scored response pairs: written by selection, read by DPO, PPO and the report."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mpo_jax.config.registry import Subset
from mpo_jax.data.token_lists import Ids, TokenLists, from_arrow, to_arrow
from mpo_jax.errors import NothingSelected
from mpo_jax.runtime.files import anew, naming_damage
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.selection import split, threshold_for_fraction

T = TypeVar("T")
FILE = "pairs.parquet"
CHUNK_ROWS = 512
"""Rows converted to or from Arrow at a time: two copies of a column exist for so many rows alone."""

_SIDES = (
    ("response", pa.string()), ("ids", pa.list_(pa.int32())), ("score", pa.float32()), ("utility", pa.float64())
)  # fmt: skip
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        *((f"{name}_{side}", kind) for side in (0, 1) for name, kind in _SIDES),
        ("chosen", pa.int32()),
        ("gap", pa.float32()),
    ]
)
"""Columns of the file. Earlier versions stored `ids` as int64; both are read."""


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
      ids: [N][2] token ids of the responses as sampled, with EOS if one was sampled; read from a file, they are
        read-only int32 views.
      score: [N, 2] raw reward-model scores.
      chosen: [N] index of the chosen side.
      gap: [N] score of the chosen side minus the other's; negative only if a human label contradicts the scores.
      utility: [N, 2] true utilities, NaN if unknown.
    """

    prompt: Sequence[str]
    response: Sequence[tuple[str, str]]
    ids: Sequence[tuple[Ids, Ids]]
    score: np.ndarray
    chosen: np.ndarray
    gap: np.ndarray
    utility: np.ndarray

    def __len__(self) -> int:
        return len(self.gap)

    def write(self, folder: Path) -> None:
        """Writes `pairs.parquet`, some rows at a time."""
        with pq.ParquetWriter(folder / FILE, SCHEMA) as writer:
            for begin in range(0, len(self), CHUNK_ROWS):
                writer.write_batch(self._arrow(slice(begin, begin + CHUNK_ROWS)))

    def _arrow(self, rows: slice) -> pa.RecordBatch:
        columns: dict[str, Any] = {"prompt": self.prompt[rows]}
        responses, ids = self.response[rows], self.ids[rows]
        for side in (0, 1):
            columns[f"response_{side}"] = [pair[side] for pair in responses]
            columns[f"ids_{side}"] = to_arrow([pair[side] for pair in ids])
            columns[f"score_{side}"] = np.asarray(self.score[rows, side], np.float32)
            columns[f"utility_{side}"] = np.asarray(self.utility[rows, side], np.float64)
        columns["chosen"] = np.asarray(self.chosen[rows], np.int32)
        columns["gap"] = np.asarray(self.gap[rows], np.float32)
        return pa.record_batch(columns, SCHEMA)

    @classmethod
    def read(cls, folder: Path) -> "PairTable":
        """The table in `folder`: numbers now, texts and ids when they are first used."""
        path = folder / FILE
        score, utility = ([_numbers(path, f"{name}_{side}") for side in (0, 1)] for name in ("score", "utility"))
        gap = _numbers(path, "gap").astype(np.float32)
        stored = partial(_Stored, len(gap))
        return cls(
            prompt=stored(lambda: _texts(path, "prompt")),
            response=stored(lambda: list(zip(_texts(path, "response_0"), _texts(path, "response_1"), strict=True))),
            ids=stored(lambda: _BothIds(*(from_arrow(_chunks(path, f"ids_{side}")) for side in (0, 1)))),
            score=np.stack(score, -1).astype(np.float32),
            chosen=_numbers(path, "chosen").astype(np.int32),
            gap=gap,
            utility=np.stack(utility, -1).astype(np.float64),
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

    def describe_split(self, subset: Subset, border: Border) -> str:
        """How many pairs are in a subset, and by what gap, as a sentence; empty for all pairs."""
        if subset == "all":
            return ""
        number, side = len(_rows(self.gap, subset, border)), "above" if subset == "easy" else "at most"
        return f"{number} of {len(self.gap)} pairs are {subset}: their gap is {side} {self.threshold(border):.4g}"

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


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored(Sequence[T], Generic[T]):
    """A column that is read on first use, so that a reader of numbers reads no texts."""

    num_rows: int
    read: Callable[[], Sequence[T]]

    @cached_property
    def _values(self) -> Sequence[T]:
        return self.read()

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: Any) -> Any:
        return self._values[row]

    def __iter__(self) -> Iterator[T]:
        return iter(self._values)


@dataclasses.dataclass(frozen=True, eq=False)
class _BothIds(Sequence[tuple[np.ndarray, np.ndarray]]):
    """The ids of both sides of every row, as views."""

    first: TokenLists
    second: TokenLists

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return self.first[row], self.second[row]


def _chunks(path: Path, name: str) -> Iterator[pa.Array]:
    """A column, some rows at a time."""
    with naming_damage(path, anew(path.parent)), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK_ROWS, columns=[name], use_threads=False):
            yield batch.column(0)


def _texts(path: Path, name: str) -> list[str]:
    return [text for chunk in _chunks(path, name) for text in chunk.to_pylist()]


def _numbers(path: Path, name: str) -> np.ndarray:
    with naming_damage(path, anew(path.parent)):
        return pq.read_table(path, columns=[name])[name].to_numpy()


def check_subsets(folder: Path, subsets: Iterable[Subset], border: Border) -> None:
    """Raises NothingSelected if a subset of the table in `folder` is empty; reads only the gaps."""
    gap_N = _numbers(folder / FILE, "gap")
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
