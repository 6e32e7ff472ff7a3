"""mpo_jax.data.packing: every token once, whole examples, and few empty columns on real lengths."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.data.batches import Buckets, TrainBatches
from mpo_jax.data.packing import Packing, first_fit, lengths_of, pack
from mpo_jax.data.tokens import Example

ids = st.lists(st.integers(1, 99), min_size=1, max_size=9)
shapes = st.builds(Packing, rows=st.integers(1, 4), columns=st.sampled_from([32, 40, 64]))


def examples_of(num_responses: int) -> st.SearchStrategy[list[Example]]:
    one = st.builds(Example, ids, st.lists(ids, min_size=num_responses, max_size=num_responses))
    return st.lists(one, min_size=1, max_size=12)


@given(st.integers(1, 2).flatmap(lambda n: st.tuples(st.just(n), examples_of(n))), shapes, st.integers(0, 3))
def test_every_token_is_there_once(drawn, packing, fill):
    """In one row, prompt first, then each response behind the one before; all that is left is padding."""
    num_responses, examples = drawn
    packed = pack(examples, packing, num_responses=num_responses, size=len(examples) + fill)
    assert packed.ids.shape == (packing.most(len(examples) + fill), packing.rows, packing.columns)
    left = np.asarray(packed.segment).copy()
    for b, example in enumerate(examples):
        m, r, t = np.nonzero(packed.segment == b + 1)
        assert set(m) == {packed.micro[b]} and len(set(r)) == 1 and (np.diff(t) == 1).all()
        parts, P = [example.prompt, *example.responses], len(example.prompt)
        assert packed.ids[m, r, t].tolist() == [x for part in parts for x in part]
        assert packed.branch[m, r, t].tolist() == [n for n, part in enumerate(parts) for _ in part]
        continued = [range(P), *(range(P, P + len(part)) for part in example.responses)]
        assert packed.position[m, r, t].tolist() == [x for part in continued for x in part]
        assert packed.prompt_len[b] == P and packed.response_len[b].tolist() == [len(x) for x in example.responses]
        left[m, r, t] = 0
    assert not left.any()
    padding = np.asarray(packed.segment) == 0
    assert not any(np.asarray(x)[padding].any() for x in (packed.ids, packed.position, packed.branch))
    assert (packed.micro[len(examples) :] == -1).all() and not packed.prompt_len[len(examples) :].any()
    assert packed.count == packed.micro.max() + 1
    assert all((np.asarray(packed.segment[m]) > 0).any() == (m < packed.count) for m in range(len(packed.ids)))


@given(examples_of(2), shapes)
def test_packing_depends_on_the_examples_alone(examples, packing):
    once, again = (pack(examples, packing, num_responses=2) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_first_fit_decreasing_is_near_the_fewest_rows(lengths, columns):
    """No row overflows, rows have no gaps in their numbers, and all but the last are together over half full."""
    row = first_fit(np.asarray(lengths), columns)
    filled = np.bincount(row, weights=lengths)
    assert filled.max() <= columns and (filled > 0).all()
    assert len(filled) <= 11 / 9 * -(-sum(lengths) // columns) + 1 or (np.asarray(lengths) > columns / 2).sum() > 1


def test_first_fit_by_hand():
    """Longest first, ties in order: 7 and 3 share a row, the fours are paired, 1 goes where there is still room."""
    assert first_fit(np.asarray([3, 4, 7, 4, 1]), 10).tolist() == [0, 1, 0, 1, 1]


def test_an_example_that_fits_no_row_is_an_error():
    with pytest.raises(ValueError, match="11 tokens does not fit into rows of 10"):
        first_fit(np.asarray([3, 11]), 10)


def test_an_example_without_a_prompt_counts_as_padding():
    """As in a padded batch, where a prompt of length 0 marks a padding row."""
    packed = pack([Example([], [[5, 6]]), Example([7], [[8]])], Packing(1, 8), num_responses=1)
    assert packed.micro.tolist() == [-1, 0] and packed.ids[0, 0].tolist() == [7, 8, 0, 0, 0, 0, 0, 0]


BATCHES = [np.asarray([30, 30, 30, 30, 40, 20, 20, 20])] * 3


def test_a_shape_holds_the_longest_and_keeps_devices_busy_within_their_memory():
    of = lambda **given: Packing.of(BATCHES, **{"longest": 40, "shards": 1, "enough": 1, "room": 1000} | given)  # noqa: E731
    assert of(longest=400, room=1).columns == 400
    assert of(enough=300).rows * of(enough=300).columns >= 300
    assert of(enough=300, room=90).rows * of(enough=300, room=90).columns <= 90
    assert of(shards=4).rows % 4 == 0


def test_rows_are_wider_than_the_longest_where_that_leaves_fewer_columns_empty():
    """Rows of 40 hold one of 30 each; of two by three fits no row of 40, and 60 holds two."""
    batch = [np.asarray([30, 30, 30, 30, 30, 30, 40])]
    assert Packing.of(batch, longest=40, shards=1, enough=1, room=1000).columns > 60


@pytest.mark.parametrize("size", [32, 64])
def test_nine_tenths_of_the_columns_hold_tokens_on_real_lengths(size, real_examples):
    """HH-RLHF's first 512 pairs in the batches that training makes; padded to four widths, it is less than half."""
    examples = real_examples
    batches = TrainBatches(examples, Buckets.of(examples, 4), size, seed=0)
    composed = [[examples[i] for i in batches[k].example] for k in range(len(examples) // size)]
    lengths = [lengths_of(batch) for batch in composed]
    longest = int(max(batch.max() for batch in lengths))
    packing = Packing.of(lengths, longest=longest, shards=1, enough=512, room=size * 1024)
    packed = [pack(batch, packing, num_responses=2) for batch in composed]
    real = sum(int((one.segment > 0).sum()) for one in packed)
    assert real == sum(int(batch.sum()) for batch in lengths)
    assert real > 0.9 * sum(int(one.count) for one in packed) * packing.rows * packing.columns
    padded = sum(rows.prompt.size + rows.response.size for rows in (batches[k].rows for k in range(len(composed))))
    assert real < 0.5 * padded


@pytest.fixture(scope="module")
def real_examples(shared_data, smollm2) -> list[Example]:
    from mpo_jax.config.load import load_config
    from mpo_jax.data.corpus import load_corpus
    from mpo_jax.data.text import TextCodec
    from mpo_jax.data.tokens import tokenize
    from mpo_jax.models.hf.tokenizer import load_tokenizer

    path = shared_data / "hh-rlhf" / "helpful-base.test.jsonl.gz"
    sizes = ("text.max_prompt_tokens=512", "text.max_response_tokens=256")
    config = load_config(None, ("data.kind=hh", f"data.path={path}", f"model.path={smollm2}", *sizes))
    codec = TextCodec(load_tokenizer(smollm2), config.text)
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in load_corpus(config).pairs[:512]]
    return tokenize(codec, rows)[0]
