"""mpo_jax.runtime.words: numbers with their units."""

import pytest

from mpo_jax.runtime.words import counted, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1 kB"), (90_000, "90 kB"), (4_190_000, "4.2 MB"),
     (13_500_000_000, "13.5 GB"), (1_620_000_000_000, "1,620.0 GB")],
)  # fmt: skip
def test_a_size_has_the_unit_that_suits_it(num_bytes, text):
    assert size(num_bytes) == text


def test_one_thing_is_no_plural():
    assert [counted(number, "stage") for number in (0, 1, 2)] == ["0 stages", "1 stage", "2 stages"]
    assert [counted(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]
