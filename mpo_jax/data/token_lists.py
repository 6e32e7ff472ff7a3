"""Lists of token ids as flat arrays: a Python list of ids takes nine times the memory of an int32 array."""

import dataclasses
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

Ids = Sequence[int] | np.ndarray
"""Token ids: a list, or a one-dimensional int32 array."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLists(Sequence[np.ndarray]):
    """Lists of token ids, one after another in one array.

    Attributes:
      ids: int32, all lists' ids; read-only.
      ends: [N] int64, where each list ends in `ids`.
    """

    ids: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        """The i-th list, a view."""
        begin = self.ends[i - 1] if i % max(len(self), 1) else 0
        return self.ids[begin : self.ends[i]]


class Growing:
    """Collects lists of ids into one array that grows in place, without a second copy at the end."""

    def __init__(self) -> None:
        self._ids, self._lengths = array("i"), array("q")
        assert self._ids.itemsize == 4

    def add(self, ids: Ids) -> None:
        self.extend(np.asarray(ids, np.int32), np.asarray([len(ids)]))

    def extend(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Adds several lists: their ids one after another, and how many each has."""
        if ids.size:  # the bytes of an empty array cannot be viewed
            self._ids.frombytes(np.ascontiguousarray(ids, np.int32).data.cast("B"))
        if lengths.size:
            self._lengths.frombytes(np.ascontiguousarray(lengths, np.int64).data.cast("B"))

    @property
    def lists(self) -> TokenLists:
        """All lists so far, without a copy; no more can be added then."""
        ids = np.frombuffer(self._ids, np.int32) if self._ids else np.zeros(0, np.int32)
        ids.flags.writeable = False
        return TokenLists(ids, np.cumsum(np.asarray(self._lengths, np.int64)))


def to_arrow(lists: Sequence[Ids]) -> pa.Array:
    """An Arrow array of type list<int32>."""
    ends = np.cumsum([len(ids) for ids in lists], dtype=np.int32)
    values = np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids in lists)])
    return pa.ListArray.from_arrays(pa.array(np.append(np.int32(0), ends)), pa.array(values))


def from_arrow(arrays: Iterable[pa.Array]) -> TokenLists:
    """The lists of Arrow arrays of integers, one array after another."""
    found = Growing()
    for part in arrays:
        found.extend(part.flatten().to_numpy(zero_copy_only=False), part.value_lengths().to_numpy())
    return found.lists
