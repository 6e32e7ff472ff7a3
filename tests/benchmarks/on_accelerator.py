"""Checks that this machine's devices compute what the CPU computes; prints a line a check, status 1 where one fails.

    .venv/bin/python tests/benchmarks/on_accelerator.py

It needs a model of no file: a random Llama of 8.3M parameters. On a CPU it runs too, and has little to compare.
"""

import dataclasses
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.config.schema import MeshConfig, OptimConfig
from mpo_jax.data.batches import Buckets, Widths, collate
from mpo_jax.data.tokens import Example
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.stages import sft
from mpo_jax.tools.bench.speed import SIZES
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.refill import sample_all
from mpo_jax.training.update import init_state
from mpo_jax.types import PromptBatch, frozen, trainable

VOCAB, EOS = 4096, 7
DECODER = DecoderConfig(vocab_size=VOCAB, max_positions=1024, **{**SIZES, "head_dim": 64})
failures: list[str] = []


def check(name: str, fine: bool, found: str) -> None:
    print(f"{'ok  ' if fine else 'FAIL'} {name}: {found}", flush=True)
    if not fine:
        failures.append(name)


def rows(num_responses: int = 2) -> PromptBatch:
    """Eight prompts of unlike lengths with responses."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(8, VOCAB, n, np.int32)  # noqa: E731
    examples = [
        Example(draw(rng.integers(20, 200)), [draw(rng.integers(20, 150)) for _ in range(num_responses)])
        for _ in range(8)
    ]
    return collate(examples, Widths.of(examples), num_responses=num_responses)


def logps(model: Model, params: Any, joined: PromptBatch, device: Any) -> np.ndarray:
    """Every response's log-probability and gradient norm of their mean, on one device."""
    with jax.default_device(device):
        params, joined = jax.device_put((params, joined), device)
        value = jax.jit(
            jax.value_and_grad(lambda p: (x := forward.response_logps(model, p, joined)).mean() + 0 * x.sum())
        )
        total, grads = value(params)
        each = jax.jit(partial(forward.response_logps, model))(params, joined)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
        return np.append(np.asarray(each).ravel(), [float(total), float(norm)])


def numbers() -> None:
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    params = jax.jit(forward.init_params, static_argnums=0)(DECODER, jax.random.key(0))
    joined, model = rows(), Model(DECODER, remat="dots")
    with jax.default_matmul_precision("highest"):
        wanted = logps(model, params, joined, cpu)
        exact = logps(model, params, joined, here)
    apart = np.abs(exact / wanted - 1).max()
    check("float32 log-probabilities and gradient, device against CPU", apart < 1e-4, f"apart by {apart:.1e}")
    names = ["xla", *{"gpu": ["pallas", "cudnn"], "tpu": ["pallas"]}.get(here.platform, [])]
    lowered = dataclasses.replace(model, dtype="bfloat16")
    apart = np.abs(logps(lowered, params, joined, here) / wanted - 1).max()
    check("bfloat16 against float32", apart < 2e-2, f"apart by {apart:.1e}")
    for name in names:
        other = dataclasses.replace(lowered, attention=name)
        apart = np.abs(logps(other, params, joined, here) / wanted - 1).max()
        check(f"bfloat16 with attention={name}", apart < 2e-2, f"apart by {apart:.1e}")


def determinism() -> None:
    """The same three updates twice, to the bit."""
    mesh, optim = make_mesh(MeshConfig()), OptimConfig()
    model = Model(DECODER, remat="dots", dtype="bfloat16")
    params = jax.jit(forward.init_params, static_argnums=0)(DECODER, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, rows(1))

    def train() -> list[bytes]:
        state = init_state(trainable(params), make_optimizer(optim), mesh)
        step = sft.make_step(model, optim, 1, mesh)
        for _ in range(3):
            state, _ = step(with_learning_rate(state, 1e-3), batch, {})
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]

    with jax.set_mesh(mesh):
        same = train() == train()
    check("three updates twice", same, "bit-identical" if same else "differ: set --xla_gpu_deterministic_ops=true")


def samples() -> None:
    """Refilled rows draw what a fixed batch draws, and cached decoding follows the full forward pass."""
    mesh = make_mesh(MeshConfig())
    model = Model(DECODER, remat="dots")
    params = frozen(jax.jit(forward.init_params, static_argnums=0)(DECODER, jax.random.key(0)))
    rng = np.random.default_rng(1)
    examples = [Example(rng.integers(8, VOCAB, rng.integers(5, 60), np.int32), []) for _ in range(24)]
    allowed_V, key = (jnp.arange(VOCAB) >= 8).at[EOS].set(True), jax.random.key(0)
    allowed_V = allowed_V & ((jnp.arange(VOCAB) < 40) | (jnp.arange(VOCAB) == EOS))
    sampling = Sampling(64, num_samples=2)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        batch = jax.tree.map(jnp.asarray, collate(examples, Widths.of(examples), num_responses=0))
        visit = jnp.zeros_like(batch.key)
        joined, _ = make_generate(model, sampling, EOS, mesh)(params, batch, key, visit, allowed_V)
        found = sample_all(
            model, params, examples, sampling=sampling, eos_id=EOS, allowed_V=allowed_V, key=key, batch_size=8,
            buckets=Buckets.of(examples, 2), mesh=mesh,
        )  # fmt: skip
    same = (np.asarray(joined.response) == found.ids).all(-1)
    check("refilled rows against a fixed batch", bool(same.mean() > 0.9), f"{same.sum()} of {same.size} samples equal")


def main() -> None:
    print(jax.devices())
    for part in (numbers, determinism, samples):
        part()
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
