"""Batches packed into micro-batches of one shape: rows hold several prompts, each whole and with all its responses.

How a batch is packed depends on its examples and the shape alone, so a resumed run packs as the first one did.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mpo_jax.data.tokens import Example
from mpo_jax.types import Packed

MULTIPLE = 8
"""Columns of a row are a multiple of this."""
WIDER = tuple(1 + eighths / 8 for eighths in range(9))
"""Candidates for a row's columns, in lengths of the longest example: where many examples are longer than half of the
longest, rows of that length would hold one each."""
TRIED = 64
"""Batches that a shape is tried on, at most."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """The shape of micro-batches: R rows of T columns."""

    rows: int
    columns: int

    def most(self, batch_size: int) -> int:
        """Micro-batches that a batch can need: no more rows than examples are used."""
        return -(-batch_size // self.rows)

    def holding(self, tokens: int) -> "Packing":
        """This shape, or a wider one if an example of so many tokens needs it."""
        return self if tokens <= self.columns else dataclasses.replace(self, columns=_up(tokens))

    @classmethod
    def of(cls, lengths: Sequence[np.ndarray], *, longest: int, shards: int, enough: int, room: int) -> "Packing":
        """The shape in which these batches leave the fewest columns empty, the smallest one of equals.

        Small micro-batches waste least, since a batch's last one is half empty on average. But a device must have
        enough tokens at a time to be busy, and never more than the memory is planned for.

        Args:
          lengths: tokens of each example, prompt and all responses, of each of some batches.
          longest: tokens of the longest example of all batches.
          shards: device groups that the rows are divided over.
          enough: tokens that keep a device group busy.
          room: tokens of a device group at a time, at most; a row holds the longest example even if that is more.
        """
        chosen = [lengths[i] for i in np.unique(np.linspace(0, len(lengths) - 1, TRIED).astype(int))]
        real, best, fewest = sum(int(batch.sum()) for batch in chosen), None, np.inf
        for wider in WIDER:
            columns = _up(int(longest * wider))
            if wider > 1 and columns > room:
                continue
            used = [int(first_fit(batch, columns).max()) + 1 for batch in chosen]
            most = max(1, room // columns)
            least = min(-(-enough // columns), most)
            for each in range(least, most + 1):
                paid = sum(-(-rows // (each * shards)) for rows in used) * each * shards * columns
                if paid - real < fewest:
                    best, fewest = cls(each * shards, columns), paid - real
        assert best is not None
        return best


def _up(n: int) -> int:
    return -(-max(n, 1) // MULTIPLE) * MULTIPLE


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """[E] tokens of each example: its prompt once, and all its responses."""
    return np.asarray([len(e.prompt) + sum(map(len, e.responses)) for e in examples], np.int64)


def first_fit(lengths: np.ndarray, columns: int) -> np.ndarray:
    """[E] the row of each example: longest first (of equals the first), each into the first row with room for it.

    First-fit decreasing needs at most 11/9 of the fewest possible rows, plus one.

    Raises:
      ValueError: if an example is longer than a row.
    """
    if len(lengths) and lengths.max() > columns:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into rows of {columns}")
    free, row = np.full(len(lengths), columns), np.zeros(len(lengths), np.int64)
    for place in np.argsort(-lengths, kind="stable"):
        row[place] = first = int(np.argmax(free >= lengths[place]))
        free[first] -= lengths[place]
    return row


def pack(examples: Sequence[Example], packing: Packing, *, num_responses: int, size: int | None = None) -> Packed:
    """The examples in micro-batches, as a batch of `size` with padding rows at its end."""
    size = len(examples) if size is None else size
    shape = (packing.most(size), packing.rows, packing.columns)
    ids, position, segment, branch = (np.zeros(shape, np.int32) for _ in range(4))
    micro, prompt_len = np.full(size, -1, np.int32), np.zeros(size, np.int32)
    response_len = np.zeros((size, num_responses), np.int32)
    row = first_fit(lengths_of(examples), packing.columns)
    filled = np.zeros(shape[:2], np.int64)
    for b, example in enumerate(examples):
        # a prompt of length 0 marks a padding row in every batch
        if not len(example.prompt):
            continue
        micro[b], r = divmod(int(row[b]), packing.rows)
        prompt_len[b] = len(example.prompt)
        begins = 0
        for n, part in enumerate((example.prompt, *example.responses)):
            first = filled[micro[b], r]
            place = (micro[b], r, slice(first, first + len(part)))
            ids[place], segment[place], branch[place] = part, b + 1, n
            position[place] = np.arange(begins, begins + len(part))
            filled[micro[b], r] += len(part)
            if n:
                response_len[b, n - 1] = len(part)
            else:
                begins = len(part)
    count = np.asarray(row.max(initial=-1) // packing.rows + 1, np.int32)
    return Packed(ids, position, segment, branch, count, micro, prompt_len, response_len)


def pack_places(
    prompt_len: np.ndarray, response_len: np.ndarray, rows: np.ndarray, packing: Packing, widths: tuple[int, int]
) -> Packed:
    """How padded rows of a prompt and one response each are packed, for ids that are on the devices.

    `ids` are places: those of the ids in all rows one after another.

    Args:
      prompt_len, response_len: [B] number of real tokens; a prompt of length 0 marks a padding row.
      rows: [B] where the rows stand among all.
      widths: columns of the prompts and of the responses, which stand side by side.
    """
    places = [
        Example(np.arange(begin, begin + p), [np.arange(begin + widths[0], begin + widths[0] + s)])
        for begin, p, s in zip(rows * sum(widths), prompt_len, response_len, strict=True)
    ]
    return pack(places, packing, num_responses=1)
