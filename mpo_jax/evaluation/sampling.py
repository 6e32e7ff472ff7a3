"""A model's answers to prompts, drawn as evaluation draws them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpo_jax.config.schema import Config
from mpo_jax.data.batches import Buckets
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import tokenize
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling
from mpo_jax.training.refill import sample_all
from mpo_jax.types import Params


def sample_texts(
    model: Model,
    params: Params,
    codec: TextCodec,
    config: Config,
    mesh: Mesh,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    key: jax.Array,
    name: str,
    tell: Callable[[int, Mapping[str, Any]], Any] | None = None,
) -> tuple[list[str], int]:
    """One response to each rendered prompt, `evaluate.batch_size` at a time, and how many prompts were cut to fit.

    A response depends on its prompt, the key and the model alone. To be called under the mesh.

    Args:
      name: what the user calls the model, for messages.
    """
    rows = [(prompt, ()) for prompt in prompts]
    examples, report = tokenize(codec, rows, cache=config.runtime.token_cache_folder)
    found = sample_all(
        model,
        params,
        examples,
        sampling=sampling,
        eos_id=codec.eos_id,
        allowed_V=jnp.asarray(codec.allowed(model.decoder.vocab_size)),
        key=key,
        buckets=Buckets.of(examples, config.text.length_buckets),
        batch_size=config.evaluate.batch_size,
        mesh=mesh,
        name=name,
        tell=tell,
    )
    ids, length = found.ids[:, 0], found.length[:, 0]
    return [codec.decode(row[:n]) for row, n in zip(ids, length, strict=True)], report.truncated_prompts
