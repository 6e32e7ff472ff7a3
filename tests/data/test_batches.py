"""mpo_jax.data.batches: widths, padding, filler, and an order that depends on the seed and the step alone."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.config import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.batches import Example, TrainBatches, Widths, collate, map_batches, num_steps, tokenize
from mpo_jax.errors import UserError
from mpo_jax.text import TextCodec

EXAMPLES = [
    Example([5, 6, 7], [[8, 2], [9]], (0.5, -1.0)),
    Example([5], [[2], [8, 9, 2]], (0.0, 2.0)),
    Example([6, 6], [[], [7]], (1.5, 0.0)),
]
WIDTHS = Widths(4, 3)


def numbered(count: int) -> list[Example]:
    """Examples whose prompt is their number."""
    return [Example([i], [[i]], (float(i),)) for i in range(count)]


def batches(count: int, size: int, seed: int = 0) -> TrainBatches:
    return TrainBatches(numbered(count), Widths(1, 1), size, seed)


def numbers(batch) -> list[int]:
    return batch.rows.prompt[:, 0].tolist()


@pytest.mark.parametrize(
    ("response", "multiple", "expected"),
    [(None, 1, (3, 3)), (None, 8, (8, 8)), (None, 4, (4, 4)), (5, 8, (8, 5)), (None, 3, (3, 3))],
)
def test_widths_round_up(response, multiple, expected):
    widths = Widths.of(EXAMPLES, response=response, multiple=multiple)
    assert (widths.prompt, widths.response) == expected


def test_widths_of_prompts_alone_leave_room_for_one_token():
    assert Widths.of([Example([1, 2], [])], multiple=1) == Widths(2, 1)


def test_collate_pads_to_the_right_and_fills_with_empty_rows():
    rows = collate(EXAMPLES, WIDTHS, num_responses=2, size=5)
    assert rows.prompt.tolist() == [[5, 6, 7, 0], [5, 0, 0, 0], [6, 6, 0, 0], [0] * 4, [0] * 4]
    assert rows.prompt_len.tolist() == [3, 1, 2, 0, 0]
    assert rows.response.tolist() == [
        [[8, 2, 0], [9, 0, 0]], [[2, 0, 0], [8, 9, 2]], [[0] * 3, [7, 0, 0]], [[0] * 3] * 2, [[0] * 3] * 2,
    ]  # fmt: skip
    assert rows.response_len.tolist() == [[2, 1], [1, 3], [0, 1], [0, 0], [0, 0]]
    assert rows.key.tolist() == [*(example.key for example in EXAMPLES), 0, 0]
    dtypes = [array.dtype for array in (rows.prompt, rows.prompt_len, rows.response, rows.response_len, rows.key)]
    assert dtypes == [np.int32] * 4 + [np.uint32]


def test_collate_without_a_size_adds_no_filler():
    rows = collate(EXAMPLES, WIDTHS, num_responses=2)
    assert rows.prompt.shape == (3, 4) and rows.response.shape == (3, 2, 3)
    assert collate([], WIDTHS, num_responses=1, size=0).prompt.shape == (0, 4)


@pytest.mark.parametrize("widths", [Widths(2, 3), Widths(4, 2)])
def test_collate_never_cuts(widths):
    with pytest.raises(ValueError, match="broadcast"):
        collate(EXAMPLES, widths, num_responses=2)


def test_a_key_depends_on_the_prompts_ids_alone():
    key = Example([5, 6, 7], [[1]]).key
    assert key == Example([5, 6, 7], [[2], [3]], (1.0,)).key == Example([np.int64(5), 6, 7], []).key
    assert 0 <= key < 2**32
    assert len({Example(list(ids), []).key for n in range(4) for ids in itertools.product(range(6), repeat=n)}) == 259
    assert Example([1, 2], []).key == 0x34FB5C82  # sha256 of two little-endian int32; samples depend on it


def test_tokenize_counts_what_it_cuts():
    codec = TextCodec(toy.make_tokenizer(), TextConfig(max_prompt_tokens=3, max_response_tokens=4))
    rows = [
        (" my boss", (" should i quit", " my boss")),  # fits exactly, EOS included
        (" my boss should i quit", (" should i quit now", " my boss, my boss")),  # all cut: one prompt, one row
    ]
    examples, report = tokenize(codec, rows)
    assert report.to_dict() == {"rows": 2, "truncated_prompts": 1, "truncated_responses": 1}
    assert [[len(e.prompt), *map(len, e.responses)] for e in examples] == [[2, 4, 3], [3, 4, 4]]
    assert [[ids[-1] == codec.eos_id for ids in e.responses] for e in examples] == [[True, True], [False, False]]


# order


@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_every_epoch_is_a_permutation(count, size, seed):
    """Read in a row, the batches are whole epochs one after another, so no example comes twice before all others."""
    source = batches(count, size, seed)
    stream = [n for k in range(-(-3 * count // size)) for n in numbers(source[k])][: 3 * count]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_differ_and_are_counted():
    source = batches(50, 20)
    stream = [(n, int(e)) for k in range(5) for n, e in zip(numbers(source[k]), source[k].epoch, strict=True)]
    assert [epoch for _, epoch in stream] == [0] * 50 + [1] * 50
    assert source[2].epoch.tolist() == [0] * 10 + [1] * 10 and source[2].epoch.dtype == np.uint32
    assert [n for n, _ in stream[:50]] != [n for n, _ in stream[50:]]
    assert [n for n, _ in stream[:50]] != list(range(50))


def test_a_batch_depends_on_seed_and_step_alone():
    """So a resumed run, which starts at k in a new process, sees what an unbroken one would have seen."""
    unbroken = batches(17, 4)
    in_order = [numbers(unbroken[k]) for k in range(30)]
    assert [numbers(batches(17, 4)[k]) for k in reversed(range(30))][::-1] == in_order
    assert [numbers(batches(17, 4, seed=1)[k]) for k in range(30)] != in_order


def test_the_batch_size_does_not_change_the_order():
    small, large = batches(17, 2), batches(17, 8)
    assert [n for k in range(16) for n in numbers(small[k])] == [n for k in range(4) for n in numbers(large[k])]


def test_extra_numbers_travel_with_their_row():
    source = TrainBatches(EXAMPLES, WIDTHS, 2, seed=3)
    seen = Counter()
    for batch in (source[k] for k in range(3)):
        assert (batch.extra.shape, batch.extra.dtype) == ((2, 2), np.float32)
        for length, key, extra in zip(batch.rows.prompt_len, batch.rows.key, batch.extra, strict=True):
            example = next(e for e in EXAMPLES if e.key == key)
            assert (length, tuple(extra)) == (len(example.prompt), example.extra)
            seen[int(key)] += 1
    assert set(seen.values()) == {2}
    assert TrainBatches([Example([1], [[2]])] * 3, WIDTHS, 2, seed=0)[0].extra.shape == (2, 0)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="nothing to train on"):
        TrainBatches([], WIDTHS, 2, seed=0)


@pytest.mark.parametrize(
    ("count", "epochs", "steps", "size", "expected"),
    [
        (100, 1.0, None, 10, 10), (105, 1.0, None, 10, 10), (105, 2.0, None, 10, 21), (100, 0.5, None, 10, 5),
        (3, 1.0, None, 10, 1), (100, 0.001, None, 10, 1), (100, 1.0, 7, 10, 7), (3, 1.0, 200, 10, 200),
    ],
)  # fmt: skip
def test_num_steps(count, epochs, steps, size, expected):
    assert num_steps(count, epochs=epochs, steps=steps, batch_size=size) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_map_batches_keeps_the_order_and_drops_the_filler(size):
    shapes = []

    def function(rows):
        shapes.append(rows.prompt.shape)
        return {"number": rows.prompt[:, 0], "length": (rows.response_len, rows.prompt_len * 2.0)}

    result = map_batches(numbered(7), Widths(1, 1), size, function)
    assert result["number"].tolist() == list(range(7))
    assert result["length"][0].tolist() == [[1]] * 7
    assert result["length"][1].tolist() == [2.0] * 7
    assert set(shapes) == {(size, 1)} and len(shapes) == -(-7 // size)
