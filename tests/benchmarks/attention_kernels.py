"""Checks the attention kernels on this machine's accelerator against XLA's attention, and times them.

    .venv/bin/python -m tests.benchmarks.attention_kernels

Values and gradients of packed rows, in float32 and bfloat16, with windows and soft caps, at every head dimension; then
milliseconds of both passes of one layer. Prints a line each, status 1 where one fails. On a CPU, where Pallas
interprets the kernels, it checks one head dimension and times nothing.
"""

import statistics
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.models import attention
from mpo_jax.models.spec import LayerSpec
from mpo_jax.runtime.sharding import platform
from mpo_jax.types import Tokens
from tests.benchmarks.attention_plan import packed_rows, passes

SPECS = {
    "plain": LayerSpec(),
    "window": LayerSpec(window=100),
    "soft cap": LayerSpec(soft_cap=2.0),
    "both": LayerSpec(window=100, soft_cap=2.0, scale=0.2),
}
ALLOWED = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest difference, in units of the largest number of an array."""


def draw(tokens: Tokens, heads: tuple[int, int], K: int) -> list[jax.Array]:
    """Queries, keys, values, in bfloat16, so that the inputs are the same in float32."""
    B, T = tokens.ids.shape
    shapes = ((B, T, n, K) for n in (heads[0], heads[1], heads[1]))
    return [jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed, shape in enumerate(shapes)]


@partial(jax.jit, static_argnums=(0, 1))
def both_passes(spec: LayerSpec, implementation: str, tokens: Tokens, *qkv: jax.Array) -> Any:
    """What real queries read, and the gradients of half its squared norm."""

    def energy(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention.for_layer(tokens, spec, implementation)(*qkv)
        out = jnp.where((tokens.segment > 0)[..., None, None], out, 0).astype(jnp.float32)
        return jnp.square(out).sum() / 2, out

    (_, out), gradients = jax.value_and_grad(energy, (0, 1, 2), has_aux=True)(*qkv)
    return out, *gradients


def numbers(head_dims: tuple[int, ...], columns: int) -> bool:
    """Whether the kernels give what XLA's attention gives in float32."""
    tokens, fine = jax.tree.map(jnp.asarray, packed_rows(2, columns)), True
    for K in head_dims:
        for name, spec in SPECS.items() if head_dims[0] == K else [("both", SPECS["both"])]:
            with jax.default_matmul_precision("highest"):
                rounded = draw(tokens, (4, 2), K)
                exact = [x.astype(jnp.float32) for x in rounded]
                wanted = [np.asarray(x) for x in both_passes(spec, "xla", tokens, *exact)]
                found = {"float32": both_passes(spec, "pallas", tokens, *exact)}
            found["bfloat16"] = both_passes(spec, "pallas", tokens, *rounded)
            for dtype, arrays in found.items():
                pairs = zip((np.asarray(x, np.float32) for x in arrays), wanted, strict=True)
                apart = max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)
                fine &= (ok := apart < ALLOWED[dtype])
                print(f"{'ok  ' if ok else 'FAIL'} head dim {K}, {name}, {dtype}: apart by {apart:.1e}", flush=True)
    return fine


def speed(repeats: int = 10) -> None:
    """Milliseconds of both passes of one layer of Llama 3 8B, over 8 packed rows of 2048 columns."""
    tokens = jax.tree.map(jnp.asarray, packed_rows(8, 2048))
    qkv = draw(tokens, (32, 8), 128)
    for name in ("blocked", "pallas", "xla"):
        run = jax.jit(partial(passes, LayerSpec(), name))
        jax.block_until_ready(run(tokens, *qkv))
        taken = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(run(tokens, *qkv))
            taken.append(time.perf_counter() - begin)
        print(f"{name}: {1e3 * statistics.median(taken):.2f} ms", flush=True)


def main() -> None:
    print(jax.devices())
    on_cpu = platform() == "cpu"
    fine = numbers((64,), 400) if on_cpu else numbers((64, 80, 96, 128, 256), 1000)
    if not on_cpu:
        speed()
    sys.exit(not fine)


if __name__ == "__main__":
    main()
