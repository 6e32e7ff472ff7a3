"""Host memory and hours of a small configuration, whose programs are listed and not compiled."""

import dataclasses

import numpy as np
import pytest

from mpo_jax.data.lengths import Lengths
from mpo_jax.runtime.sharding import device_bytes
from mpo_jax.stages.shapes import Amounts
from mpo_jax.stages.stage import Program
from mpo_jax.tools.plan import host, hours, report, targets
from mpo_jax.tools.plan.collectives import Traffic
from mpo_jax.tools.plan.measure import Measured, Plan
from tests.tools.plan.test_measure import FSDP, planned

OFFLOAD = ("runtime.offload_frozen=true", "runtime.offload_moments=true")
ROWS = Amounts(
    demonstrations=640, reward_pairs=320, reward_watched=16, reward_test=16, held_out=16, prompts=320, human_pairs=320,
    selected=320, test_prompts=16,
)  # fmt: skip


def listed(plan: Plan, stage: str, traffic: tuple[Traffic, ...] = ()) -> list[Measured]:
    def one(program: Program) -> Measured:
        return Measured(program, None, 0, 1.0, traffic, 0.0, 1.0)

    return [one(program) for program in plan.programs([stage])]


def test_a_cpu_without_a_size_does_not_judge():
    """Neither a host's memory, which is not known, nor programs that are larger than this machine's."""
    for on, advises in (("cpu", False), ("cpu:0.001", True)):
        plan = planned(on=on)
        large = [dataclasses.replace(one, refused=2**60) for one in listed(plan, "sft")]
        lines = report.unfit(large, plan)
        assert any("Change one of" in line for line in lines) == advises
        assert any("does not judge" in line for line in lines) != advises
        assert report.unfit([], plan) == []
        (row,) = zip(
            *(column.cells for column in report.host_table(host.host_memory(large, plan), plan).columns), strict=True
        )
        assert row[-2:] == ("-", "-")


def on_gpus(plan: Plan) -> Plan:
    """The same plan with an accelerator's rates."""
    return dataclasses.replace(plan, target=targets.parse("a100x8", cpu_devices=8))


def test_a_host_holds_the_states_being_written_and_what_is_offloaded():
    plain, moved = planned(FSDP), planned(FSDP, *OFFLOAD)
    programs = {p.name: p for p in plain.programs(["ppo"])}
    actor, critic = (programs[f"ppo {name}"].arguments({})[0] for name in ("actor", "critic"))
    frozen = [frozen for _, frozen in programs["ppo score"].arguments({})[:2]]
    (one,), (other,) = (host.host_memory(listed(plan, "ppo"), plan) for plan in (plain, moved))
    # eight devices of one host
    assert one.checkpoint == other.checkpoint == 8 * (device_bytes(actor) + device_bytes(critic))
    assert one.pinned == 0
    assert other.pinned == 8 * (2 * device_bytes((actor.opt_state, critic.opt_state)) + device_bytes(tuple(frozen)))
    # embedding and head are the largest tensors: the toy's vocabulary of 32 columns
    assert one.loading == 4 * plain.decoder.vocab_size * 32


def test_what_is_offloaded_is_not_held_on_the_devices():
    plain, moved = ({p.name: p for p in planned(FSDP, *o).programs(["ppo"])} for o in ((), OFFLOAD))
    actor, critic = (plain[f"ppo {name}"].arguments({})[0] for name in ("actor", "critic"))
    moments = device_bytes((actor.opt_state, critic.opt_state))
    frozen = device_bytes([frozen for _, frozen in plain["ppo score"].arguments({})[:2]])
    less = {name: device_bytes(plain[name].held) - device_bytes(moved[name].held) for name in plain}
    assert less["ppo decode"] == less["ppo prefill"] == moments + frozen
    # while they score, frozen models are on the devices; while a model updates, so are its own moments
    assert less["ppo score"] == moments
    assert less["ppo critic"] == device_bytes(actor.opt_state) + frozen


def test_too_small_a_host_is_named():
    gib = 2**30
    small = host.HostMemory("ppo", pinned=30 * gib, checkpoint=40 * gib, loading=2 * gib, available=64 * gib)
    assert small.needed == 78 * gib and not small.fits
    first, *changes = host.short([small, dataclasses.replace(small, available=None)])
    assert "ppo needs 78 GiB of host memory, and a host is assumed to have 64" in first
    assert len(changes) == 2 and "runtime.offload_moments=false" in changes[0]


def test_hours_add_up_calls():
    """At 45% of 312 TFLOP/s of eight devices; a program that waits for its links takes as long as they do."""
    plan = on_gpus(planned(FSDP, "sft.train.steps=null", "sft.train.epochs=1"))
    programs = {p.name: p for p in plan.programs(["sft"], amounts=ROWS)}
    rate = 8 * 312e12 * 0.45
    calls = {"sft step": 640 / 16, "sft nll": 1}
    assert {name: p.runs for name, p in programs.items()} == calls
    (one,) = hours.stage_times(listed(plan, "sft"), plan, ROWS)
    work = {name: p.work.flops + p.work.recomputed for name, p in programs.items()}
    assert one.full == pytest.approx(sum(calls[name] * work[name] for name in calls) / rate)
    assert one.expected == one.full and one.calls == 40
    (slow,) = hours.stage_times(listed(plan, "sft", (Traffic("all-gather", 1, 10**12),)), plan, ROWS)
    assert slow.full == slow.expected == pytest.approx(41 * 1e12 / (300e9 * 0.6))


def test_hours_count_rows_at_their_widths():
    """All rows 8 + 8 tokens of 40 + 16 allowed."""
    plan = on_gpus(planned(FSDP))
    rows = Lengths(np.full(10, 8), np.full((10, 1), 8))
    (one,) = hours.stage_times(listed(plan, "sft"), plan, dataclasses.replace(ROWS, lengths={"demonstrations": rows}))
    # a little over 16 / 56: logits are of response tokens, which are half as many, and attention shrinks faster
    assert 0.2 < one.expected / one.full < 0.5


def test_a_stage_with_a_program_that_does_not_compile_has_no_hours():
    plan = on_gpus(planned(FSDP))
    measured = listed(plan, "sft")
    measured[0] = dataclasses.replace(measured[0], seconds=None)
    assert hours.stage_times(measured, plan, ROWS) == []
