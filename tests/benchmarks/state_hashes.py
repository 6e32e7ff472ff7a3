"""Seconds of a training state's two hashes, taken in turn in one process: on the devices, and by sha256 on the host.

    python -m tests.benchmarks.state_hashes [--layers 20]

The state is a model's parameters in float32 with both of AdamW's moments: 300M parameters, 3.6 GB, by default.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from mpo_jax.config.schema import ArchitectureConfig, MeshConfig, OptimConfig
from mpo_jax.models import forward, loading
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.training.hashes import leaf_hashes, sha256_hashes
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import init_state
from mpo_jax.types import trainable

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    sizes = ArchitectureConfig(
        hidden_size=1024, intermediate_size=2816, num_layers=parser.parse_args().layers, num_heads=16, num_kv_heads=16,
        head_dim=64, max_positions=1024,
    )  # fmt: skip
    decoder = loading.from_architecture(sizes, 32000)
    mesh = make_mesh(MeshConfig(fsdp=len(jax.devices())))
    shapes = forward.abstract_params(decoder)
    # one number everywhere: drawing 300M would take longer than all else, and no hash is faster for it
    make = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02), shapes),
                   out_shardings=forward.param_shardings(shapes, mesh))  # fmt: skip
    with jax.set_mesh(mesh):
        state = init_state(trainable(make()), make_optimizer(OptimConfig()), mesh, donate=True)
        jax.block_until_ready(state)
        gigabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
        count = sum(leaf.size for leaf in jax.tree.leaves(state.trainable)) / 1e6
        print(f"{count:.0f}M parameters, {gigabytes:.2f} GB, {len(jax.devices())} {jax.devices()[0].device_kind}")
        begin = time.perf_counter()
        leaf_hashes(state)
        print(f"first call, compilation included: {time.perf_counter() - begin:.2f} s")
        seconds: dict[str, list[tuple[float, float]]] = {"on the devices": [], "sha256": []}
        for _ in range(REPEATS):
            for name, hash_of in zip(seconds, (leaf_hashes, sha256_hashes), strict=True):
                begin, busy = time.perf_counter(), time.process_time()
                hash_of(state)
                seconds[name].append((time.perf_counter() - begin, time.process_time() - busy))
    best = {name: [min(kind) for kind in zip(*times, strict=True)] for name, times in seconds.items()}
    for name, (wall, busy) in best.items():
        print(f"{name}: {wall:.2f} s, {busy:.2f} s of the processor; {gigabytes / wall:.2f} GB/s")
    ratios = [old / new for old, new in zip(best["sha256"], best["on the devices"], strict=True)]
    print(f"sha256 / on the devices: {ratios[0]:.2f}, {ratios[1]:.2f} of the processor's time")


if __name__ == "__main__":
    main()
