"""Lengths of a sample of rows: what batches are padded to and how long responses are, without tokenizing every row."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mpo_jax.data.batches import Buckets, Widths
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, Row, tokenize

SAMPLED = 500
"""Rows of a set that are tokenized for its lengths; its mean length is then known to about 3%."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of evenly spaced rows of a set, after truncation.

    Attributes:
      prompt: [E] prompt tokens.
      response: [E N] tokens of each response.
    """

    prompt: np.ndarray
    response: np.ndarray

    @classmethod
    def of(cls, codec: TextCodec, rows: Sequence[Row]) -> "Lengths | None":
        """The lengths of at most `SAMPLED` of the rows; None without rows."""
        if not rows:
            return None
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED)).astype(int))
        examples, _ = tokenize(codec, [rows[i] for i in chosen])
        prompt = np.asarray([len(example.prompt) for example in examples])
        return cls(prompt, np.asarray([[len(ids) for ids in example.responses] for example in examples]))

    def answered(self, response: np.ndarray, num_samples: int) -> "Lengths":
        """The same prompts with responses whose lengths are drawn from `response`, the same at every call."""
        drawn = np.random.default_rng(0).choice(response.ravel(), (len(self.prompt), num_samples))
        return Lengths(self.prompt, drawn)

    def in_batches(self, size: int) -> "Lengths":
        """The same prompts, each with one response as long as the longest of a batch of `size` is on average."""
        return Lengths(self.prompt, np.full((len(self.prompt), 1), round(self.longest(size))))

    def longest(self, count: int) -> float:
        """Expected length of the longest of `count` responses drawn independently: sum of n P(longest = n)."""
        values, times = np.unique(self.response, return_counts=True)
        at_most = np.cumsum(times) / times.sum()
        return float((values * np.diff(at_most**count, prepend=0.0)).sum())

    def widths(self, count: int) -> list[tuple[Widths, float]]:
        """The widths of `Buckets.of` with at most `count` buckets, each with its share of the rows.

        Training groups rows of one bucket within a window of batches, so a share of the rows is about a share of the
        batches.
        """
        # lengths alone are read
        examples = [
            Example(range(p), [range(n) for n in row]) for p, row in zip(self.prompt, self.response, strict=True)
        ]
        buckets = Buckets.of(examples, count)
        shares = np.bincount(buckets.place(examples), minlength=len(buckets.widths)) / len(examples)
        return [(widths, float(share)) for widths, share in zip(buckets.widths, shares, strict=True) if share]
