"""Scores of responses: the one place where stored responses go through a model for one number each."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.tokens import Example
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.types import Head, Params, PromptBatch


def score_examples(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    *,
    head: Head,
    batch_size: int,
    length_buckets: int,
    mesh: Mesh,
    name: str = "the model",
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """[E N] float32: a reward model's raw score of each response, or a language model's log-probability in nats.

    To be called under the mesh.

    Args:
      batch_size: prompts at a time.
      name: what the user calls the model, for messages.
      progress: called with the number of batches scored so far, the one at hand included.

    Raises:
      UserError: if there are no examples, or a score is not finite.
    """
    score = (forward.make_score_pairs if head == "value" else forward.make_response_logps)(model, mesh)
    count = 0

    def measure(batch: PromptBatch) -> Any:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count)
        return score(params, place_batch(batch, mesh))

    return map_batches(examples, Buckets.of(examples, length_buckets), batch_size, measure, models=name)
