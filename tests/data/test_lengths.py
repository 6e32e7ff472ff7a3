"""Lengths of rows: the expected longest of a batch, and widths with their shares, against counting."""

import itertools

import numpy as np
import pytest

from mpo_jax.config.schema import TextConfig
from mpo_jax.data import lengths as module
from mpo_jax.data.lengths import Lengths
from mpo_jax.data.text import TextCodec
from mpo_jax.data.toy import make_tokenizer


def test_the_longest_of_a_batch_by_enumeration():
    lengths = Lengths(np.asarray([4, 4, 4]), np.asarray([[1], [3], [8]]))
    for count in (1, 2, 3):
        draws = [max(draw) for draw in itertools.product((1, 3, 8), repeat=count)]
        assert lengths.longest(count) == pytest.approx(np.mean(draws))


def test_widths_cover_the_rows_in_their_shares():
    """Three short rows of four, one long; a second bucket is worth it, a third has nothing to save."""
    lengths = Lengths(np.asarray([5, 6, 7, 60]), np.asarray([[3, 8], [8, 1], [2, 2], [9, 30]]))
    assert [(w.prompt, w.response, share) for w, share in lengths.widths(1)] == [(64, 32, 1.0)]
    assert [(w.prompt, w.response, share) for w, share in lengths.widths(3)] == [(8, 8, 0.75), (64, 32, 0.25)]


def test_rollouts_are_as_wide_as_their_batch_s_longest():
    lengths = Lengths(np.asarray([5, 60]), np.asarray([[1], [20]])).in_batches(1000)
    assert {(w.prompt, w.response) for w, _ in lengths.widths(2)} == {(8, 24), (64, 24)}


def test_sampled_responses_are_drawn_from_those_given():
    drawn = Lengths(np.full(400, 3), np.zeros((400, 0), int)).answered(np.asarray([[2], [9], [9]]), 2)
    assert drawn.response.shape == (400, 2) and set(drawn.response.ravel()) == {2, 9}
    assert drawn.response.mean() == pytest.approx(20 / 3, rel=0.1)


def test_a_sample_is_spread_over_the_rows(monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 3)
    codec = TextCodec(make_tokenizer(), TextConfig())
    word = codec.tokenizer.decode([30]).strip()
    rows = [(" ".join([word] * (i + 1)), (word, word)) for i in range(5)]
    found = Lengths.of(codec, rows)
    assert found is not None and found.response.shape == (3, 2)
    first, middle, last = found.prompt
    assert last - middle == middle - first == 2
    assert Lengths.of(codec, []) is None
