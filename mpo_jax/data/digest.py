"""What tokenized rows are, as one hash."""

import hashlib
from collections.abc import Iterable

import numpy as np

from mpo_jax.data.tokens import Example


def digest(examples: Iterable[Example]) -> str:
    """sha256 over the ids, order and visits of rows."""
    found = hashlib.sha256()
    for example in examples:
        texts = [np.asarray(ids, np.int32) for ids in (example.prompt, *example.responses)]
        found.update(np.asarray([example.visit, *map(len, texts), -1], np.int64).tobytes())
        for ids in texts:
            found.update(ids.tobytes())
    return found.hexdigest()
