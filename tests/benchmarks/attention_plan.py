"""Compiles attention alone, forward and backward, for devices that need not be there; prints a table.

    python tests/benchmarks/attention_plan.py a100x1 h100x1 v5e:1x1 v5p:1x1x1 --head-dims 64 80 96 128 256

It needs the compilers of `mpo plan` (launch/setup.sh plan-gpu plan-tpu). With several devices in a target, rows and
heads are divided over `fsdp=N/2` and `tensor=2`. One row of the table is one program for one device:

- temporaries: scratch memory, by the compiler;
- FLOPs: of the products over all listed pairs of blocks, forward and backward, for rows packed with drawn lengths;
- bytes: moved to and from device memory at least. Pallas: every array as often as a pass reads or writes it. Blocked:
  what is handed from one product of a pair of blocks to the next, and what its loops carry.
"""

import argparse
import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.config.schema import MeshConfig
from mpo_jax.models import attention, packed_attention, pallas_attention, pallas_kernels
from mpo_jax.models.spec import LayerSpec
from mpo_jax.runtime.sharding import BATCH_AXES, mesh_of
from mpo_jax.tools.plan import compilers, targets
from mpo_jax.types import Tokens

PRODUCTS = {"blocked": 7, "pallas": 9}
"""Products of a pair of blocks in both passes: the kernels make scores and their gradients once more each."""


def packed_rows(rows: int, columns: int, *, seed: int = 0) -> Tokens:
    """Rows of prompts with two responses each, some 300 tokens a prompt, as many as fit; the rest is padding."""
    rng = np.random.default_rng(seed)
    position, segment, branch = (np.zeros((rows, columns), np.int32) for _ in range(3))
    for row in range(rows):
        place = 0
        while True:
            prompt, *responses = rng.integers(20, 240, 3).tolist()
            if place + prompt + sum(responses) > columns:
                break
            number = segment[row].max() + 1
            for which, length in enumerate((prompt, *responses)):
                where, begin = slice(place, place + length), prompt if which else 0
                segment[row, where], branch[row, where] = number, which
                position[row, where] = begin + np.arange(length)
                place += length
    return Tokens(segment, position, segment, branch, branch > 0, packed=True)


def passes(spec: LayerSpec, implementation: str, tokens: Tokens, *qkv: jax.Array) -> Any:
    """What a layer's attention gives, and the gradients of half its squared norm."""

    def energy(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention.for_layer(tokens, spec, implementation)(*qkv)
        return jnp.square(out.astype(jnp.float32)).sum() / 2, out

    return jax.value_and_grad(energy, (0, 1, 2), has_aux=True)(*qkv)


def block_pairs(tokens: Tokens, implementation: str, width: int) -> float:
    """Tokens of queries times tokens of keys that are multiplied, over all rows."""
    if implementation == "blocked":
        layout = packed_attention.layout_of(tokens)
        C, B, width = layout.tokens.ids.shape
        return float((np.arange(C) + 1 - np.asarray(layout.first)).sum()) * B * width**2
    layout = pallas_attention.layout_of(tokens, width, None)
    return float(np.asarray(layout.keys)[..., 0].sum()) * width**2


def least_bytes(implementation: str, pairs: float, args: argparse.Namespace, K: int) -> float:
    """Bytes of device memory that both passes must move; pairs are those of all heads."""
    size = jnp.dtype(args.dtype).itemsize
    if implementation == "pallas":
        # queries, outputs and their gradients, eight times in the three kernels; keys, values and theirs as often
        return args.rows * args.columns * K * size * 8 * (args.heads + args.kv_heads)
    width = args.columns / min(args.columns // packed_attention.BLOCK, packed_attention.MAX_BLOCKS)
    tile, block = width**2, width * K
    groups = args.kv_heads / args.heads
    # of each float32 tile between two products: written, read, and its rounded copy written and read
    forward = tile * (2 * 4 + 2 * size) + 2 * 4 * block + 2 * size * block * groups
    backward = 2 * tile * (2 * 4 + 2 * size) + 2 * 4 * block + (2 * size + 4 * 4) * block * groups
    return pairs / tile * (forward + backward)


def compiled(target: targets.Target, implementation: str, args: argparse.Namespace, K: int) -> dict[str, Any]:
    """One program's line of the table."""
    tensor = 2 if target.num_devices > 1 else 1
    shape = MeshConfig(data=1, fsdp=target.num_devices // tensor, tensor=tensor)
    mesh = mesh_of(shape, compilers.devices(target))
    here = packed_rows(args.rows, args.columns)
    B, T, dtype = args.rows * shape.fsdp, args.columns, jnp.dtype(args.dtype)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    tokens = jax.tree.map(lambda x: jax.ShapeDtypeStruct((B, T), x.dtype, sharding=rows), here)
    heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    qkv = [jax.ShapeDtypeStruct((B, T, n, K), dtype, sharding=heads) for n in (args.heads, *[args.kv_heads] * 2)]
    spec = LayerSpec(window=args.window, soft_cap=args.soft_cap)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        program = jax.jit(partial(passes, spec, implementation)).lower(tokens, *qkv).compile()
    platform: Any = target.platform
    pairs = block_pairs(here, implementation, pallas_kernels.width_of(platform, T, K, dtype)) * args.heads / tensor
    moved = least_bytes(implementation, pairs, args, K) / (1 if implementation == "blocked" else tensor)
    return {
        "target": target.name,
        "head_dim": K,
        "attention": implementation,
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "flops": 2 * PRODUCTS[implementation] * pairs * K,
        "bytes": moved,
        "compile_s": time.perf_counter() - begin,
        "kernels": program.as_text().count("attention_d_key"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--attention", nargs="+", default=["blocked", "pallas"])
    parser.add_argument("--rows", type=int, default=8, help="rows a device")
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--window", type=int)
    parser.add_argument("--soft-cap", type=float)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--precision", help="jax_default_matmul_precision")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each program instead of a table")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", args.precision)
    if not args.json:
        print("| target | head dim | attention | temporaries, MiB | TFLOPs | GB moved | compiled in s |")
        print("|---|---|---|---|---|---|---|")
    for name in args.targets:
        target = targets.parse(name, cpu_devices=1)
        compilers.prepare(target)
        for K in args.head_dims:
            for implementation in args.attention:
                found = compiled(target, implementation, args, K)
                if args.json:
                    print(json.dumps(found), flush=True)
                    continue
                print(
                    f"| {name} | {K} | {implementation} | {found['temporaries'] / 2**20:.0f} | "
                    f"{found['flops'] / 1e12:.3f} | {found['bytes'] / 1e9:.2f} | {found['compile_s']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
