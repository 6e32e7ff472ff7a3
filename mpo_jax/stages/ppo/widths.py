"""How many response columns an iteration works on: those of its longest sample, rounded up to one of a few widths."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mpo_jax.runtime.sharding import batch_sharding, replicated
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.stages.widths import few_widths
from mpo_jax.types import PromptBatch


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
