"""How the models read an iteration's samples: packed, or padded to the longest of them, rounded up to a few widths."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mpo_jax.data.batches import TrainBatches
from mpo_jax.data.packing import Packing, pack_places
from mpo_jax.runtime.sharding import batch_sharding, packed_sharding, place_batch, replicated
from mpo_jax.stages.packed import packing_of_samples
from mpo_jax.stages.ppo.settings import Method, Settings
from mpo_jax.stages.widths import few_widths
from mpo_jax.types import Packed, PromptBatch


class Samples(NamedTuple):
    """Samples as the models read them.

    Attributes:
      joined: prompts with one response each; without the prompts' ids where they are packed, so that one program serves
        all widths of prompts.
      packed: the packed rows; None: the models read `joined`.
      pack: a function from some of the rows to these packed, if all are.
    """

    joined: PromptBatch
    packed: Packed | None = None
    pack: Callable[[np.ndarray], Packed] | None = None


def packing_for(settings: Settings, batches: TrainBatches, mesh: Mesh) -> Packing | None:
    """The shape of the rows that scoring and updates read; None if they are padded.

    Args:
      batches: the prompts.
    """
    if not settings.packed:
        return None
    return packing_of_samples(batches, settings.text.max_response_tokens, settings.update, mesh)


def make_lay_out(method: Method, packing: Packing | None, mesh: Mesh) -> Callable[[PromptBatch], Samples]:
    """A function from sampled responses to what the models read: packed into rows of this shape, or padded.

    The host waits for the lengths of the samples, unless all are padded to one width.
    """
    if packing is None:
        narrow = make_narrow(method, mesh)
        return lambda joined: Samples(narrow(joined))
    measure, fill = _make_measure(mesh), _make_fill(mesh)

    def lay_out(joined: PromptBatch) -> Samples:
        lengths, rest = measure(joined)
        prompt_len, response_len = map(np.asarray, lengths)
        widths = joined.prompt.shape[1], joined.response.shape[2]

        def pack(rows: np.ndarray) -> Packed:
            places = pack_places(prompt_len[rows], response_len[rows, 0], rows, packing, widths)
            return fill(joined, place_batch(places, mesh))

        return Samples(rest, pack(np.arange(len(prompt_len))), pack)

    return lay_out


@lru_cache
def _make_measure(mesh: Mesh) -> Any:
    """The jitted (samples) -> (lengths of prompts and responses, samples without the prompts' ids)."""

    def measure(joined: PromptBatch) -> tuple[tuple[Any, Any], PromptBatch]:
        rest = dataclasses.replace(joined, prompt=joined.prompt[:, :0])
        return (joined.prompt_len, joined.response_len), rest

    return jax.jit(measure, out_shardings=(replicated(mesh), batch_sharding(mesh)))


@lru_cache
def _make_fill(mesh: Mesh) -> Any:
    """The jitted (samples, packed places in their rows) -> the packed ids."""

    def fill(joined: PromptBatch, places: Packed) -> Packed:
        rows = jnp.concatenate([joined.prompt, joined.response[:, 0]], axis=1)
        ids = jnp.take(rows.reshape(-1), places.ids, mode="clip")
        return dataclasses.replace(places, ids=jnp.where(places.segment > 0, ids, 0))

    return jax.jit(fill, out_shardings=packed_sharding(mesh))


@lru_cache
def make_narrow(method: Method, mesh: Mesh) -> Callable[[PromptBatch], PromptBatch]:
    """A function from sampled responses to the same ones in the fewest columns that a width holds them in.

    Where there are several widths, the host waits for the longest response. All devices compute it, so all processes
    choose the same width.
    """
    # ds_chat rewards the column behind the last token, where there is one
    behind = int(method.reward_at == "ds_chat")

    def longest(response_len: Int[Array, "B N"]) -> Int[Array, ""]:
        return response_len.max()

    def cut(joined: PromptBatch, width: int) -> PromptBatch:
        return dataclasses.replace(joined, response=joined.response[:, :, :width])

    measure = jax.jit(longest, out_shardings=replicated(mesh))
    narrowed = jax.jit(cut, static_argnums=1, out_shardings=batch_sharding(mesh))

    def narrow(joined: PromptBatch) -> PromptBatch:
        columns = joined.response.shape[2]
        widths = few_widths(columns)
        if len(widths) == 1:
            return joined
        needed = min(int(measure(joined.response_len)) + behind, columns)
        width = next(width for width in widths if width >= needed)
        return joined if width == columns else narrowed(joined, width)

    return narrow
