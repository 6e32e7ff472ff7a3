"""Suggested changes if a program does not fit, most effective first."""

import math

from mpo_jax.models.packed import packed_in
from mpo_jax.tools.plan.measure import Measured, Plan

HELD_LARGE = 0.6
"""The share of memory above which stored arrays, not the batch, are the problem."""


def advice(plan: Plan, measured: Measured) -> list[str]:
    """Overrides or other changes, each with its cost."""
    config, program = plan.config, measured.program
    mesh = config.mesh
    changes: list[str] = []
    if program.accumulation is not None:
        finer = next_accumulation(plan, program.stage, program.accumulation)
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


def accumulations(plan: Plan, stage: str) -> list[int]:
    """Values of a stage's train.accumulation that its batch divides by on this mesh, ascending, each with smaller
    micro-batches than the one before.

    Packed micro-batches hold no more tokens than keep a device busy, so that the first few divisors may change nothing.
    """
    config = plan.config
    rows = getattr(config, stage).train.batch_size // (config.ppo.minibatches if stage == "ppo" else 1)
    divisors = [a for a in range(1, rows + 1) if rows % a == 0 and (rows // a) % config.mesh.batch_shards == 0]
    if not divisors or _packed_tokens(plan, stage, divisors[0]) is None:
        return divisors
    tokens = [_packed_tokens(plan, stage, a) for a in divisors]
    return [a for a, size, before in zip(divisors, tokens, [None, *tokens[:-1]], strict=True) if size != before]


def next_accumulation(plan: Plan, stage: str, current: int) -> int | None:
    """The first value above the current one with smaller micro-batches than it has; None if there is none."""
    return next((a for a in accumulations(plan, stage) if a > current), None)


def _packed_tokens(plan: Plan, stage: str, accumulation: int) -> int | None:
    """Columns of a packed micro-batch of the stage's update; None if its rows are padded, or it has none."""
    changed = plan.changed({stage: {"train": {"accumulation": accumulation}}})
    update = next((p for p in changed.programs([stage]) if p.accumulation is not None), None)
    packed = None if update is None else packed_in(update.arguments({}))
    return None if packed is None else math.prod(packed.ids.shape[1:])
