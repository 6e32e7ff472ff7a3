"""Suggested changes if a program does not fit, most effective first."""

from mpo_jax.config.schema import Config
from mpo_jax.tools.plan.measure import Measured

HELD_LARGE = 0.6
"""The share of memory above which stored arrays, not the batch, are the problem."""


def advice(config: Config, measured: Measured) -> list[str]:
    """Overrides or other changes, each with its cost."""
    program, mesh = measured.program, config.mesh
    changes: list[str] = []
    if program.accumulation is not None:
        finer = next_accumulation(config, program.stage, program.accumulation)
        if finer is not None:
            changes.append(f"{program.batch_key}={finer}: the same global batch in smaller parts, exact")
        if config.model.remat != "full":
            changes.append("model.remat=full: the backward pass recomputes each layer, a third more arithmetic")
    elif program.stage in ("select", "evaluate"):
        rows = (config.select if program.stage == "select" else config.evaluate).batch_size
        if rows > mesh.batch_shards:
            smaller = max(rows // 2 // mesh.batch_shards, 1) * mesh.batch_shards
            changes.append(f"{program.batch_key}={smaller}: fewer rows per call, the same results")
    if program.name.endswith(("prefill", "decode")):
        changes.append("mesh.tensor=2 with half the mesh.fsdp: weights and caches of sampling are divided over tensor")
    if config.model.logit_chunk > 256 and not program.name.endswith(("reward step", "critic", "prefill", "decode")):
        changes.append("model.logit_chunk=256: fewer logits in memory at a time")
    if "float32" in (config.model.compute_dtype, config.model.frozen_dtype):
        changes.append(
            "model.compute_dtype=bfloat16 model.frozen_dtype=bfloat16: half the activations and frozen models"
        )
    stored = measured.memory.arguments + measured.memory.held if measured.memory else 0
    if stored > HELD_LARGE * measured.capacity:
        changes.append("more devices along mesh.fsdp, which divides parameters, moments and frozen models")
    elif not changes:
        changes.append("more devices along mesh.data or mesh.fsdp, or devices with more memory")
    return changes


def accumulations(config: Config, stage: str) -> list[int]:
    """All numbers of micro-batches into which a stage's batch divides on this mesh, ascending."""
    train = getattr(config, stage).train
    rows = train.batch_size // (config.ppo.minibatches if stage == "ppo" else 1)
    return [a for a in range(1, rows + 1) if rows % a == 0 and (rows // a) % config.mesh.batch_shards == 0]


def next_accumulation(config: Config, stage: str, current: int) -> int | None:
    return next((a for a in accumulations(config, stage) if a > current), None)
