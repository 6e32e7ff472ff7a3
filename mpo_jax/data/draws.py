"""NumPy's random draws, one at a time, without the time that a call of NumPy takes.

Every draw here is the one that `numpy.random.default_rng(seed)` makes. A call of `Generator.choice` takes 20 us and one
of `Generator.integers` 2 us, nearly all of it on the way into C, and a toy world makes a million of them. NumPy keeps
the words of a `BitGenerator` from version to version, and not what its `Generator` makes of them.
"""

from collections.abc import Iterator

import numpy as np

BLOCK = 4096
"""Words that are fetched at once."""
LOW = 0xFFFFFFFF
"""Mask of a word's lower half."""


class Draws:
    """A random stream. `seed` is what `numpy.random.default_rng` takes."""

    def __init__(self, seed: int | tuple[int, ...]):
        self._word = _words(np.random.PCG64(seed)).__next__
        self._half: int | None = None

    def random(self) -> float:
        """Uniform in [0, 1), of the upper 53 bits of a word: `Generator.random`."""
        return (self._word() >> 11) * 2.0**-53

    def below(self, limit: int) -> int:
        """Uniform in 0 ... limit - 1, for 0 < limit < 2^32: `Generator.integers`. Lemire's method, arXiv:1805.10941."""
        if limit == 1:
            return 0
        product = self._half_word() * limit
        if product & LOW < limit:
            uneven = (LOW + 1 - limit) % limit
            while product & LOW < uneven:
                product = self._half_word() * limit
        return product >> 32

    def distinct(self, limit: int, count: int) -> list[int]:
        """`count` different numbers of 0 ... limit - 1 in random order: `Generator.choice` without replacement.

        Floyd's algorithm and a shuffle, as NumPy has it for limits of at most 10,000.
        """
        drawn: list[int] = []
        for last in range(limit - count, limit):
            number = self.below(last + 1)
            drawn.append(last if number in drawn else number)
        for place in range(count - 1, 0, -1):
            other = self.below(place + 1)
            drawn[place], drawn[other] = drawn[other], drawn[place]
        return drawn

    def _half_word(self) -> int:
        """32 bits: the lower half of a word, and at the next call its upper half."""
        if self._half is not None:
            half, self._half = self._half, None
            return half
        word = self._word()
        self._half = word >> 32
        return word & LOW


def _words(bits: np.random.PCG64) -> Iterator[int]:
    while True:
        yield from bits.random_raw(BLOCK).tolist()
