"""mpo_jax.runtime.prefetch: the items in order, one ahead."""

import threading

import pytest

from mpo_jax.runtime.prefetch import prefetched


def test_the_items_in_order():
    assert list(prefetched(range(5))) == [0, 1, 2, 3, 4]
    assert list(prefetched([])) == []


def test_the_next_one_is_made_while_one_is_used_and_no_more():
    made = [threading.Event() for _ in range(4)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    found = prefetched(items())
    assert next(found) == 0 and made[1].wait(10)
    assert not made[2].is_set()
    assert next(found) == 1 and made[2].wait(10)
    assert not made[3].is_set()
    found.close()


def test_an_error_is_raised_where_its_item_is_due():
    def items():
        yield 1
        raise ValueError("the second")

    found = prefetched(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="the second"):
        next(found)


def test_no_thread_is_left():
    before = threading.active_count()
    found = prefetched(range(9))
    next(found)
    found.close()
    assert threading.active_count() == before
