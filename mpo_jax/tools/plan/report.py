"""Formats a plan as tables for the terminal and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mpo_jax.runtime.device_kinds import known
from mpo_jax.runtime.version import __version__
from mpo_jax.runtime.words import counted
from mpo_jax.tools.plan.advice import advice
from mpo_jax.tools.plan.collectives import Traffic
from mpo_jax.tools.plan.host import HostMemory
from mpo_jax.tools.plan.hours import StageTime
from mpo_jax.tools.plan.measure import Measured, Plan, gib, time_parts
from mpo_jax.tools.plan.targets import CPU

DEFINITIONS = """\
GiB are per device. held: arrays that the stage keeps besides the arguments (other models, optimiser states, initial
parameters). peak: arguments + temporaries + new results + held. FLOPs: matrix products of one call on all devices, with
padded tokens, without recomputation. estimate: seconds of one call, the longest of arithmetic (recomputation included),
reading in a decode loop, and communication, as if they overlapped. PPO's decode is counted to the last column;
selection and evaluation refill rows, so their prefill is one portion of prompts and their decode one chunk of tokens
for all rows. Host: offloaded arrays, and beside them the copy of a state that is being written, or a tensor being read;
8 GiB are added for the process. Collectives: bytes each device takes part in, once + in loops (all iterations)."""


def memory_table(measured: Sequence[Measured], plan: Plan) -> Table:
    """Arguments, temporaries and peak of every program, compared with the device's memory."""
    table = Table(title=f"Memory on {plan.target.name}, GiB a device", title_justify="left")
    table.add_column("program")
    for name in ("arguments", "temporaries", "held", "peak", "usable", "fits", "compile s"):
        table.add_column(name, justify="right")
    for one in measured:
        parts = ["-"] * 3
        if one.memory is not None:
            m = one.memory
            parts = [f"{gib(size):.3g}" for size in (m.arguments, m.temporaries, m.held)]
        verdict = "yes" if one.fits else "[red]NO[/red]"
        peak, usable = f"{gib(one.peak):.3g}", f"{gib(one.capacity):.3g}"
        table.add_row(one.program.name, *parts, peak, usable, verdict, f"{one.compile_s:.1f}")
    return table


def work_table(measured: Sequence[Measured], plan: Plan) -> Table:
    """FLOPs, estimated time and collectives of every program."""
    table = Table(title=f"Work and communication on {plan.target.name}", title_justify="left")
    table.add_column("program")
    for name in ("FLOPs", "estimate s", "bound by"):
        table.add_column(name, justify="right")
    table.add_column("collectives: GB once + in loops")
    for one in measured:
        estimate = "-" if one.seconds is None else f"{one.seconds:.3g}"
        moved = ", ".join(_traffic(t) for t in one.traffic) or "none"
        table.add_row(one.program.name, f"{one.program.work.flops:.3g}", estimate, bound(one, plan) or "-", moved)
    return table


def host_table(hosts: Sequence[HostMemory], plan: Plan) -> Table:
    """What each stage needs of a host's memory."""
    count = plan.target.devices_per_host
    table = Table(title=f"Memory of a host with {count} devices, GiB", title_justify="left")
    table.add_column("stage")
    for name in ("offloaded", "checkpoint", "reading", "needed", "assumed", "fits"):
        table.add_column(name, justify="right")
    for one in hosts:
        sizes = (f"{gib(size):.3g}" for size in (one.pinned, one.checkpoint, one.loading, one.needed))
        available = "-" if one.available is None else f"{gib(one.available):.3g}"
        verdict = "-" if one.available is None else "yes" if one.fits else "[red]NO[/red]"
        table.add_row(one.stage, *sizes, available, verdict)
    return table


def hours_table(times: Sequence[StageTime], plan: Plan) -> Table:
    """Estimated hours of every stage over all rows."""
    table = Table(title=f"Hours on {plan.target.name}, DPO on all pairs and PPO on all prompts", title_justify="left")
    table.add_column("stage")
    for name in ("calls", "hours", "at full width"):
        table.add_column(name, justify="right")
    for one in times:
        table.add_row(one.stage, f"{one.calls:,.0f}", f"{one.expected / 3600:.3g}", f"{one.full / 3600:.3g}")
    return table


def bound(one: Measured, plan: Plan) -> str | None:
    """The name of the longest part of the estimate."""
    parts = time_parts(one.program.work, one.traffic, plan.target)
    return None if parts is None or one.memory is None else max(parts, key=lambda name: parts[name])


def _traffic(one: Traffic) -> str:
    about = "" if one.exact else "~"
    return f"{one.kind} {one.bytes / 1e9:.2g}+{about}{one.loop_bytes / 1e9:.3g}"


def notes(plan: Plan) -> list[str]:
    """What the numbers are based on."""
    _, share = known()
    target = plan.target
    lines = [f"sizes: {plan.sizes_from}; mesh {dict(plan.mesh.shape)}; remat {plan.config.model.remat}"]
    if target.kind is None:
        lines.append(
            "cpu: compiled by XLA's CPU backend, which fuses less and computes in float32 by default. Take it as an "
            "upper bound for accelerators, whose memory and collectives differ, and as no verdict on this machine; no "
            "time is estimated"
        )
    else:
        kind = target.kind
        lines.append(
            f"assumed, not measured: {share.matmul:.0%} of {kind.bf16_tflops:g} TFLOP/s, {share.bandwidth:.0%} of "
            f"{kind.hbm_gbs:g} GB/s memory, {share.link:.0%} of {kind.link_gbs:g} GB/s links"
            + (f" and of {kind.network_gbs:g} GB/s network" if target.spans_network else "")
        )
    return [*lines, *_rewards(plan)]


def _rewards(plan: Plan) -> list[str]:
    """How what `reward.path` or `reward.function` names is counted."""
    reward, own = plan.config.reward, plan.text_rewards
    if reward.function is not None:
        return [f"reward.function={reward.function} runs on the host: its time and memory are not counted"]
    if reward.path is None:
        return []
    if own is None:
        return [f"reward.path={reward.path} is counted as a model of the policy's sizes and tokens"]
    return [
        f"reward.path={reward.path} reads text: counted at rows of {own.max_tokens} of its tokens, in "
        "hours as many as the policy's; the host's work is not counted"
    ]


def unfit(measured: Sequence[Measured], plan: Plan) -> list[str]:
    """Lines for each program that does not fit: its peak, the memory there is, and what to change.

    `cpu` without a size is no machine to train on, so its memory is no reason to change anything.
    """
    lines = []
    large = sum(not one.fits for one in measured)
    if large and plan.target.name == CPU:
        return [
            f"larger than this machine's memory: {counted(large, 'program')}. --on {CPU} is an upper bound and does "
            f"not judge: name a device, or {CPU}:GIB for one with so much memory"
        ]
    for one in measured:
        if not one.fits:
            lines.append(
                f"{one.program.name} does not fit: {gib(one.peak):.3g} GiB of {gib(one.capacity):.3g}. Change one of:"
            )
            lines.extend(f"  {change}" for change in advice(plan, one))
    return lines


def to_json(
    measured: Sequence[Measured],
    plan: Plan,
    hosts: Sequence[HostMemory] = (),
    times: Sequence[StageTime] = (),
    basis: str = "",
) -> dict[str, Any]:
    """The whole plan as plain values, in bytes, seconds and FLOPs.

    Args:
      basis: what the stages' times are based on.
    """
    _, share = known()
    kind = plan.target.kind
    return {
        "version": __version__,
        "target": plan.target.name,
        "upper_bound": kind is None,
        "device": None if kind is None else kind.model_dump(mode="json"),
        "devices": plan.target.num_devices,
        "utilisation": share.model_dump(mode="json"),
        "sizes": plan.sizes_from,
        "mesh": dict(plan.mesh.shape),
        "config": plan.config.model_dump(mode="json"),
        "programs": [_program(one, plan) for one in measured],
        "hosts": [{**dataclasses.asdict(one), "needed": one.needed, "fits": one.fits} for one in hosts],
        "times": [dataclasses.asdict(one) for one in times],
        "times_basis": basis,
    }


def _program(one: Measured, plan: Plan) -> dict[str, Any]:
    memory = None
    if one.memory is not None:
        memory = dataclasses.asdict(one.memory)
    return {
        "stage": one.program.stage,
        "name": one.program.name,
        "memory": memory,
        "peak": one.peak,
        "usable": one.capacity,
        "fits": one.fits,
        "advice": advice(plan, one) if not one.fits else [],
        "compile_s": round(one.compile_s, 2),
        "flops": one.program.work.flops,
        "recomputed_flops": one.program.work.recomputed,
        "estimate_s": one.seconds,
        "bound_by": bound(one, plan),
        "collectives": [dataclasses.asdict(t) for t in one.traffic],
    }
