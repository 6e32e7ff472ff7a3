"""A model's answers to prompts: the one place where prompts go through a model with rows refilled."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpo_jax.data.batches import Buckets, Progress
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime.passes import Pass
from mpo_jax.training.refill import Samples, sample_all
from mpo_jax.types import Params


def sample_examples(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    codec: TextCodec,
    *,
    sampling: Sampling,
    key: jax.Array,
    batch_size: int,
    mesh: Mesh,
    name: str = "the model",
    keep: Pass | None = None,
    progress: Progress | None = None,
) -> Samples:
    """`sampling.num_samples` samples of every tokenized prompt; one depends on prompt, key and its number alone.

    To be called under the mesh.

    Args:
      batch_size: prompts at a time.
      name: what the user calls the model, for messages.
      keep: keeps whole prompts' samples as they are made, and has those of an earlier run.
      progress: called with finished prompts, and with tokens and the rate of ends since the call before.
    """
    return sample_all(
        model,
        params,
        examples,
        sampling=sampling,
        eos_id=codec.ends,
        allowed_V=jnp.asarray(codec.allowed(model.decoder.vocab_size)),
        key=key,
        buckets=Buckets.of(examples, codec.config.length_buckets),
        batch_size=batch_size,
        mesh=mesh,
        name=name,
        keep=keep,
        progress=progress,
    )


def sample_texts(
    model: Model,
    params: Params,
    codec: TextCodec,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    key: jax.Array,
    batch_size: int,
    mesh: Mesh,
    cache: Path | None = None,
    name: str = "the model",
    progress: Progress | None = None,
) -> tuple[list[str], int]:
    """One response to each rendered prompt, and how many prompts were cut to fit. To be called under the mesh.

    Args:
      cache: folder of tokenized rows.
      name: what the user calls the model, for messages.
    """
    examples, report = tokenize(codec, [(prompt, ()) for prompt in prompts], cache=cache)
    found = sample_examples(
        model, params, examples, codec, sampling=sampling, key=key, batch_size=batch_size, mesh=mesh, name=name,
        progress=progress,
    )  # fmt: skip
    ids, length = found.ids[:, 0], found.length[:, 0]
    return [codec.decode(row[:n]) for row, n in zip(ids, length, strict=True)], report.truncated_prompts
