"""Making the next item while the current one is used."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def prefetched(items: Iterable[T]) -> Generator[T, None, None]:
    """The items in order; a thread makes one ahead. An error in making an item is raised where the item is due.

    The thread takes no mesh or other JAX context along: items should be made of NumPy arrays.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, "prefetch") as pool:
        following = pool.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = pool.submit(next, iterator, _END)
            yield item
