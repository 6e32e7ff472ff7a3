"""mpo_jax.data.batches: widths, padding, buckets, filler."""

import signal

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.data import batches
from mpo_jax.data.batches import Buckets, Widths, collate, map_batches, num_steps, padded_batches
from mpo_jax.data.digest import digest
from mpo_jax.data.tokens import Example
from mpo_jax.errors import PassPreempted, UserError
from mpo_jax.runtime.parts import Parts
from mpo_jax.runtime.passes import Pass

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


def test_collate_takes_arrays_as_well_as_lists():
    arrays = [Example(np.asarray(e.prompt, np.int32), [np.asarray(r, np.int32) for r in e.responses]) for e in EXAMPLES]
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal, collate(arrays, WIDTHS, num_responses=2), collate(EXAMPLES, WIDTHS, num_responses=2)
        )
    )


# buckets


def sized(*lengths: tuple[int, ...]) -> list[Example]:
    """Examples of (prompt, response, ...) lengths whose first prompt id is their number."""
    return [Example([i] * p, [[1] * n for n in responses]) for i, (p, *responses) in enumerate(lengths)]


def padded(buckets: Buckets, examples: list[Example]) -> int:
    num = len(examples[0].responses)
    return sum(buckets.widths[b].prompt + num * buckets.widths[b].response for b in buckets.place(examples))


SIZES = st.lists(st.tuples(st.integers(1, 80), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=60)


@given(SIZES, st.integers(1, 6), st.sampled_from([1, 8]), st.sampled_from([None, 48]))
def test_buckets_hold_everything_in_few_tokens(sizes, count, multiple, response):
    examples = sized(*sizes)
    buckets = Buckets.of(examples, count, multiple=multiple, response=response)
    widest = Widths.of(examples, multiple=multiple, response=response)
    assert 1 <= len(buckets.widths) <= count and buckets.widths[-1] == widest
    assert len(set(buckets.widths)) == len(buckets.widths)
    for example, place in zip(examples, buckets.place(examples), strict=True):
        holding = [
            w.prompt + 2 * w.response
            for w in buckets.widths
            if len(example.prompt) <= w.prompt and max(map(len, example.responses)) <= w.response
        ]
        assert min(holding) == buckets.widths[place].prompt + 2 * buckets.widths[place].response
    fewer = [padded(Buckets.of(examples, n, multiple=multiple, response=response), examples) for n in range(1, count)]
    assert sorted([*fewer, padded(buckets, examples)], reverse=True) == [*fewer, padded(buckets, examples)]
    assert Buckets.of(examples[::-1], count, multiple=multiple, response=response) == buckets
    for width in buckets.widths:
        assert width.prompt % multiple == 0 and (width.response == response or width.response % multiple == 0)


@given(SIZES, st.sampled_from([None, 5]))
def test_one_bucket_is_the_narrowest_widths(sizes, response):
    examples = sized(*sizes)
    assert Buckets.of(examples, 1, response=response).widths == (Widths.of(examples, response=response),)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([(8, 8)] * 50 + [(64, 64)] * 50, 4, [(8, 8), (64, 64)]),
        ([(3, 5)] * 50 + [(60, 64)] * 50, 2, [(8, 8), (64, 64)]),
        # neither shape holds the other, so each needs its own beside the one that holds both
        ([(64, 8)] * 60 + [(8, 64)] * 60, 3, [(8, 64), (64, 8), (64, 64)]),
        ([(64, 8)] * 70 + [(8, 64)] * 50, 2, [(64, 8), (64, 64)]),
        # two responses count twice: the row of 16 + 2 * 24 costs as much as one of 64
        ([(64, 0, 0)] * 20 + [(16, 24, 24)] * 20, 3, [(16, 24), (64, 8), (64, 24)]),
        ([(8,)] * 30 + [(40,)] * 30 + [(96,)] * 30, 3, [(8, 8), (40, 8), (96, 8)]),
        ([(8, 8)] * 100, 4, [(8, 8)]),
        # cost with two responses: 40 + 2 * 8 is less than 8 + 2 * 32
        ([(40, 8, 8)] * 20 + [(8, 32, 32)] * 20, 3, [(40, 8), (8, 32), (40, 32)]),
        # 160 of 7200 tokens are not worth a compilation, 320 are
        ([(56, 8)] * 20 + [(64, 8)] * 80, 4, [(64, 8)]),
        ([(48, 8)] * 20 + [(64, 8)] * 80, 4, [(48, 8), (64, 8)]),
    ],
)
def test_buckets_by_hand(sizes, count, expected):
    assert Buckets.of(sized(*sizes), count).widths == tuple(Widths(*widths) for widths in expected)


def test_buckets_follow_the_best_of_many_shapes():
    """With a single bucket to add, greedy is the best choice among all multiples, but for the grid's coarseness."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal([5.5, 3.5], 0.6, (400, 2)).astype(int) + 1, [512, 128])
    examples = sized(*lengths.tolist())
    tokens = padded(Buckets.of(examples, 2), examples)
    widest = Widths.of(examples)
    best = min(
        padded(Buckets((Widths(p, r), widest)), examples)
        for p in range(8, widest.prompt + 1, 8)
        for r in range(8, widest.response + 1, 8)
    )
    alone = padded(Buckets((widest,)), examples)
    assert alone - tokens > 0.95 * (alone - best)
    assert padded(Buckets.of(examples, 4), examples) < 0.9 * tokens < 0.7 * alone


def test_the_cheapest_bucket_that_holds_all_rows_is_taken():
    """Rows of two buckets, neither of which holds the other's, need the third."""
    buckets = Buckets((Widths(8, 64), Widths(64, 8), Widths(64, 64), Widths(96, 96)))
    assert buckets.holding(sized((8, 9), (8, 64))) == Widths(8, 64)
    assert buckets.holding(sized((8, 8))) == Widths(8, 64)
    assert buckets.holding(sized((9, 8))) == Widths(64, 8)
    assert buckets.holding(sized((8, 64), (64, 8))) == Widths(64, 64)
    assert buckets.holding(sized((8, 64), (65, 8))) == Widths(96, 96)


def test_longer_examples_than_the_buckets_are_refused():
    buckets = Buckets.of(sized((8, 8)), 1)
    for example in sized((9, 8)) + sized((8, 9)):
        with pytest.raises(ValueError, match="longer than the widest bucket"):
            buckets.place([example])


def test_no_examples_make_no_buckets():
    with pytest.raises(UserError, match="no rows to batch"):
        Buckets.of([], 2)


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

    result = map_batches(numbered(7), Buckets((Widths(1, 1),)), size, function)
    assert result["number"].tolist() == list(range(7))
    assert result["length"][0].tolist() == [[1]] * 7
    assert result["length"][1].tolist() == [2.0] * 7
    assert set(shapes) == {(size, 1)} and len(shapes) == -(-7 // size)


def test_map_batches_pads_each_row_to_its_own_bucket():
    sizes = [(4, 2), (30, 2), (4, 20), (8, 8), (30, 20), (2, 1), (31, 3)]
    buckets = Buckets((Widths(8, 8), Widths(32, 8), Widths(32, 24)))
    seen = []

    def function(rows):
        seen.append((rows.prompt.shape, rows.response.shape))
        width = np.full(rows.prompt_len.shape, rows.prompt.shape[1] + rows.response.shape[2])
        return rows.prompt[:, 0], width, rows.response, rows.prompt_len.astype(np.float64)[:, None] / 2

    number, width, response, half = map_batches(sized(*sizes), buckets, 2, function)
    assert number.tolist() == list(range(7))
    assert width.tolist() == [16, 40, 56, 16, 56, 16, 40]
    assert response.shape == (7, 1, 24) and response.dtype == np.int32
    assert response.sum((1, 2)).tolist() == [n for _, n in sizes]
    assert half.tolist() == [[p / 2] for p, _ in sizes] and half.dtype == np.float64
    shapes = [((2, w.prompt), (2, 1, w.response)) for w in buckets.widths]
    assert seen == [shapes[0], shapes[0], shapes[1], shapes[2]]


def test_padded_batches_number_their_rows_and_their_filler():
    """Every example once, by its number; -1 where a row only fills the batch."""
    examples = sized((4, 2), (30, 2), (4, 20), (8, 8), (2, 1))
    found = list(padded_batches(examples, Buckets((Widths(8, 8), Widths(32, 24))), 2))
    assert [batch.number for batch in found] == [0, 1, 2]
    assert [batch.example.tolist() for batch in found] == [[0, 3], [4, -1], [1, 2]]
    for batch in found:
        assert batch.epoch.tolist() == [0, 0] and batch.epoch.dtype == np.uint32
        for number, length in zip(batch.example, batch.rows.prompt_len, strict=True):
            assert length == (0 if number < 0 else len(examples[number].prompt))


@given(SIZES, st.integers(1, 4), st.integers(1, 9))
def test_map_batches_agrees_with_row_by_row(sizes, count, size):
    examples = sized(*sizes)
    buckets = Buckets.of(examples, count)
    calls = []

    def function(rows):
        calls.append(rows)
        return rows.prompt, rows.response_len

    prompt, length = map_batches(examples, buckets, size, function)
    assert [[i for i in row if i] for row in prompt.tolist()] == [[i for i in e.prompt if i] for e in examples]
    assert length.tolist() == [[len(r) for r in e.responses] for e in examples]
    assert {rows.prompt.shape[0] for rows in calls} == {size}
    assert len(calls) == sum(-(-count // size) for count in np.bincount(buckets.place(examples)))


def test_map_batches_of_nothing_is_refused():
    with pytest.raises(UserError, match="no rows to run a model on"):
        map_batches([], ONE, 2, lambda rows: rows.prompt)


class Kill(Exception):
    """Ends a pass without a word."""


def kept(folder, total) -> Pass:
    return Pass("scores", total, Parts(folder, {}, minutes=0))


def test_map_batches_goes_on_with_the_same_batches(tmp_path):
    """Killed again and again, each batch is made once, with the rows and the widths of an uninterrupted run."""
    sizes = [(4, 2), (30, 2), (4, 20), (8, 8), (30, 20), (2, 1), (31, 3)]
    examples = sized(*sizes)
    buckets, made, told = Buckets((Widths(8, 8), Widths(32, 24))), [], []

    def function(rows):
        made.append(rows.prompt_len.tolist())
        return {"a": rows.prompt.sum(1) / np.float32(7), "b": rows.response}

    models = {"a": "one", "b": "one"}
    wanted = map_batches(examples, buckets, 2, function, models=models)
    whole, rounds = list(made), 0
    made.clear()
    while True:
        rounds += 1
        try:
            with kept(tmp_path, len(examples)) as keep:
                check, keep.check = keep.check, lambda: (_ for _ in ()).throw(Kill)
                if rounds == len(whole):
                    keep.check = check
                found = map_batches(
                    examples, buckets, 2, function, models=models, keep=keep, progress=lambda *one: told.append(one)
                )
            break
        except Kill:
            # one more was under way
            made[rounds:] = []
    assert rounds == len(whole) == 4 and made == whole
    assert [done for done, _ in told] == [2, 3, 5, 7]
    assert sum(metrics["tokens"] for _, metrics in told) == sum(map(sum, sizes))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    # all of it is there: nothing is made, not even to learn what the results look like
    with kept(tmp_path, len(examples)) as keep:
        again = map_batches(examples, buckets, 2, lambda rows: pytest.fail("made"), models=models, keep=keep)
    np.testing.assert_array_equal(again["b"], wanted["b"])


def test_map_batches_stops_on_sigterm_with_its_finished_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "simulated", lambda: False)

    def function(rows):
        if rows.prompt[0, 0] == 2:
            signal.raise_signal(signal.SIGTERM)
        return rows.prompt[:, 0]

    with pytest.raises(PassPreempted, match="2 of 7 rows of scores, which are saved"), kept(tmp_path, 7) as keep:
        map_batches(numbered(7), ONE, 1, function, models="a model", keep=keep)
    with kept(tmp_path, 7) as keep:
        assert keep.done == 2
        found = map_batches(numbered(7), ONE, 1, lambda rows: rows.prompt[:, 0], models="a model", keep=keep)
    assert found.tolist() == list(range(7))


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_two_batches_at_most_are_under_way(monkeypatch, one_at_a_time):
    """The next one is dispatched before the host waits for one, and no more; on simulated devices none is."""
    monkeypatch.setattr(batches, "simulated", lambda: one_at_a_time)
    events = []

    class Output:
        """A device's array that says when the host waits for it."""

        def __init__(self, rows):
            self.rows = rows
            events.append(("dispatched", int(rows.prompt[0, 0])))

        def __array__(self, dtype=None, copy=None):
            events.append(("fetched", int(self.rows.prompt[0, 0])))
            return self.rows.prompt[:, 0]

    map_batches(numbered(4), ONE, 1, Output)
    order = [("dispatched", 0), ("dispatched", 1), ("fetched", 0), ("dispatched", 2), ("fetched", 1),
             ("dispatched", 3), ("fetched", 2), ("fetched", 3)]  # fmt: skip
    if one_at_a_time:
        order = [(what, number) for number in range(4) for what in ("dispatched", "fetched")]
    assert events == order


def test_digests_tell_rows_apart_by_ids_order_and_visit():
    one = [Example([1, 2], [[3], [4]]), Example([5], [[6], [7]])]
    same = [Example(np.asarray([1, 2], np.int32), [np.asarray([3]), [4]]), Example([5], [[6], [7]])]
    others = [
        one[::-1], one[:1], [Example([1, 2], [[3, 4], []]), one[1]], [Example([1], [[2, 3], [4]]), one[1]],
        [Example([1, 2], [[3], [4]], visit=1), one[1]], [Example([1, 2], [[4], [3]]), one[1]],
    ]  # fmt: skip
    assert digest(one) == digest(same)
    assert len({digest(rows) for rows in (one, *others)}) == 1 + len(others)
