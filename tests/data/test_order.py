"""mpo_jax.data.batches.TrainBatches: an order by seed and step alone, and each batch's widths."""

from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.data import batches as module
from mpo_jax.data.batches import Batch, Buckets, TrainBatches, Widths
from mpo_jax.data.tokens import Example
from mpo_jax.errors import UserError

EXAMPLES = [
    Example([5, 6, 7], [[8, 2], [9]]),
    Example([5], [[2], [8, 9, 2]]),
    Example([6, 6], [[], [7]]),
]
WIDTHS = Widths(4, 3)
ONE = Buckets((WIDTHS,))


def numbered(count: int) -> list[Example]:
    """Examples whose prompt is their number."""
    return [Example([i], [[i]]) for i in range(count)]


def batches(count: int, size: int, seed: int = 0) -> TrainBatches:
    return TrainBatches(numbered(count), Buckets((Widths(1, 1),)), size, seed)


def numbers(batch) -> list[int]:
    return batch.rows.prompt[:, 0].tolist()


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


@given(st.integers(1, 23), st.integers(1, 9))
def test_without_shuffling_rows_come_in_file_order(count, size):
    """Batch k holds rows k B to (k + 1) B - 1, around the end to the first; epochs are counted as ever."""
    source = TrainBatches(numbered(count), Buckets((Widths(1, 1),)), size, seed=5, shuffle=False)
    for k in (0, 1, 7):
        places = np.arange(k * size, (k + 1) * size)
        assert numbers(source[k]) == (places % count).tolist()
        assert source[k].epoch.tolist() == (places // count).tolist()


def test_the_number_of_its_example_travels_with_each_row():
    """By it, what is known of an example, such as its log-probabilities under a reference, finds its row."""
    source = TrainBatches(EXAMPLES, ONE, 2, seed=3)
    seen = Counter()
    for k in range(3):
        batch = source[k]
        assert batch.number == k and batch.example.shape == (2,)
        for length, key, number in zip(batch.rows.prompt_len, batch.rows.key, batch.example, strict=True):
            example = EXAMPLES[number]
            assert (length, key) == (len(example.prompt), example.key)
            seen[int(number)] += 1
    assert seen == {0: 2, 1: 2, 2: 2}
    in_order = TrainBatches(EXAMPLES, ONE, 2, seed=3, shuffle=False)
    assert [in_order[k].example.tolist() for k in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_one_bucket_keeps_grains_order():
    order = grain.MapDataset.range(50).seed(7).shuffle().repeat()
    source = batches(50, 4, seed=7)
    assert [n for k in range(40) for n in numbers(source[k])] == [order[i] for i in range(160)]


# order with several buckets

LONG, SHORT = Widths(16, 8), Widths(8, 8)


def test_without_shuffling_no_lengths_are_brought_together():
    lengths = [1, 9, 2, 9, 1, 1]
    examples = [Example([1] * n, [[2]]) for n in lengths]
    source = TrainBatches(examples, Buckets.of(examples, 2), 2, seed=0, shuffle=False)
    assert [source[k].rows.prompt_len.tolist() for k in range(3)] == [[1, 9], [2, 9], [1, 1]]
    assert [source[k].rows.prompt.shape[1] for k in range(3)] == [16, 16, 8]


def mixed(count: int, size: int, seed: int = 0, share: int = 3) -> TrainBatches:
    """Every share-th example is long."""
    examples = [Example([i] * (16 if i % share == 0 else 4), [[i]]) for i in range(count)]
    return TrainBatches(examples, Buckets((SHORT, LONG)), size, seed)


def widths_of(batch: Batch) -> Widths:
    return Widths(batch.rows.prompt.shape[1], batch.rows.response.shape[2])


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 5)


@pytest.mark.thorough
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_every_epoch_is_a_permutation_with_buckets_too(count, size, seed):
    source = mixed(count, size, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", 3)
        seen = [source[k] for k in range(-(-3 * count // size))]
    stream = [n for batch in seen for n in numbers(batch)][: 3 * count]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    epochs = [int(e) for batch in seen for e in batch.epoch]
    assert epochs == [i // count for i in range(len(epochs))]


def test_a_window_holds_the_rows_that_it_would_hold_without_buckets(short_windows):
    """So that the order stays nearly as random as the shuffle: a row moves by less than a window."""
    plain, sorted_ = batches(300, 4, seed=5), mixed(300, 4, seed=5)
    for window in range(15):
        rows = [sorted(n for k in range(5) for n in numbers(s[5 * window + k])) for s in (plain, sorted_)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("count", [1200, 1203])  # in the second, an epoch begins within a batch
def test_a_batch_has_one_bucket_but_where_two_meet(short_windows, count):
    source = mixed(count, 8)
    long = [[n % 3 == 0 for n in numbers(source[k])] for k in range(300)]
    two = [any(rows) and not all(rows) and len(set(source[k].epoch)) == 1 for k, rows in enumerate(long)]
    assert all(sum(two[k : k + 5]) <= 1 for k in range(0, 300, 5))
    assert [widths_of(source[k]) for k in range(300)] == [LONG if any(rows) else SHORT for rows in long]
    assert sum(not any(rows) for rows in long) > 120


def test_within_a_bucket_rows_keep_the_order_of_the_shuffle():
    source = mixed(600, 8)
    order = [n for k in range(75) for n in numbers(batches(600, 8)[k])]
    for k in range(75):
        places = [order.index(n) for n in numbers(source[k])]
        if len({n % 3 == 0 for n in numbers(source[k])}) == 1:
            assert places == sorted(places)


def test_every_window_has_its_own_shuffle(monkeypatch, short_windows):
    keys = []
    original = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.append(tuple(key)) or original(key))
    for seed in (3, 4):
        source = mixed(40, 4, seed=seed)
        for k in range(20):
            source[k]
    assert keys == [(seed, epoch, window) for seed in (3, 4) for epoch in (0, 1) for window in (0, 1)]


def test_short_batches_do_not_all_come_first(short_windows):
    """Each place within a window, an epoch's first and last batch included, is long about as often as any other."""
    source = mixed(200, 10)
    long = np.asarray([widths_of(source[k]) == LONG for k in range(500)]).reshape(-1, 5).mean(0)
    assert (abs(long - long.mean()) < 0.15).all()
    assert {widths_of(source[k]) for k in range(0, 500, 20)} == {widths_of(source[k]) for k in range(19, 500, 20)}


def test_the_parts_of_batches_at_an_epochs_ends_are_long_and_short(short_windows):
    source = mixed(57, 10)
    heads = [[n % 3 == 0 for n, e in zip(numbers(b), b.epoch, strict=True) if e == b.epoch[-1]]
             for b in (source[k] for k in range(150)) if b.epoch[0] != b.epoch[-1]]  # fmt: skip
    assert 0.1 < np.mean([head[0] for head in heads]) < 0.9


@pytest.mark.thorough
def test_a_bucketed_batch_depends_on_seed_and_step_alone(short_windows):
    unbroken = mixed(57, 4)
    in_order = [numbers(unbroken[k]) for k in range(60)]
    assert [numbers(mixed(57, 4)[k]) for k in reversed(range(60))][::-1] == in_order
    assert [numbers(unbroken[k]) for k in range(60)] == in_order
    assert [numbers(mixed(57, 4, seed=1)[k]) for k in range(60)] != in_order


def test_only_the_windows_in_use_are_kept(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4)
    source = mixed(22, 4)
    made = []
    original = TrainBatches._make_window
    monkeypatch.setattr(TrainBatches, "_make_window", lambda self, *at: made.append(at) or original(self, *at))
    for k in (0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11):  # batch 5 lies in two epochs
        source[k]
    assert made == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="nothing to train on"):
        TrainBatches([], ONE, 2, seed=0)
