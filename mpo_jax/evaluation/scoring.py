"""Scores of responses: the one place where stored responses go through a model for one number each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mpo_jax.data.batches import Buckets, Progress, map_batches
from mpo_jax.data.packing import Packing
from mpo_jax.data.tokens import Example
from mpo_jax.models import forward, responses
from mpo_jax.models.forward import Model
from mpo_jax.runtime.passes import Pass
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.types import Head, Params


def score_examples(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    *,
    head: Head,
    batch_size: int,
    length_buckets: int,
    mesh: Mesh,
    packing: Packing | None = None,
    name: str = "the model",
    keep: Pass | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """[E N] float32: a reward model's raw score of each response, or a language model's log-probability in nats.

    To be called under the mesh.

    Args:
      batch_size: prompts at a time.
      length_buckets: widths that batches are padded to, at most, where they are not packed.
      packing: the shape of packed rows, in which a response's number depends to rounding on its neighbours; None: the
        rows are padded, and it does not.
      name: what the user calls the model, for messages.
      keep: keeps scores as they are made, and has those of an earlier run.

    Raises:
      UserError: if there are no examples, or a score is not finite.
    """
    score = make_score(model, head, mesh, packed=packing is not None)

    def measure(batch: Any) -> Any:
        return score(params, place_batch(batch, mesh))

    layout = packing or Buckets.of(examples, length_buckets)
    return map_batches(examples, layout, batch_size, measure, models=name, keep=keep, progress=progress)


def make_score(model: Model, head: Head, mesh: Mesh, *, packed: bool) -> Any:
    """The jitted (params, batch) -> [B N] of padded or packed batches."""
    if packed:
        return responses.make_packed_score(model, head, mesh)
    return (forward.make_score_pairs if head == "value" else forward.make_response_logps)(model, mesh)
