"""Programs of a small configuration, compiled for simulated CPU devices: what is read is what is there."""

import dataclasses

import jax
import numpy as np
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.errors import UserError
from mpo_jax.models.flops import Work
from mpo_jax.runtime.device_kinds import known
from mpo_jax.runtime.sharding import device_bytes
from mpo_jax.tools.plan import advice, compilers, fit, measure, targets
from mpo_jax.tools.plan.collectives import Traffic
from tests.pipeline.test_pipeline import MICRO

pytestmark = pytest.mark.optimised

FSDP = "mesh.fsdp=8"
# logits of 24 x 512 float32 a row outweigh everything else
WIDE = ("sft.train.batch_size=64", "model.logit_chunk=100000", "text.max_response_tokens=24")


def planned(*overrides: str, on: str = "cpu") -> measure.Plan:
    config = load_config(MICRO, overrides)
    return measure.prepare(config, targets.parse(on, cpu_devices=config.mesh.num_devices))


@pytest.fixture(scope="module")
def plan() -> measure.Plan:
    return planned(FSDP)


@pytest.fixture(scope="module")
def programs(plan):
    return {program.name: program for program in plan.programs()}


def test_every_stage_has_its_programs(programs):
    assert list(programs) == [
        "sft step", "sft nll", "reward step", "reward score",
        "select weights", "select prefill", "select decode", "select score",
        "dpo reference", "dpo step",
        "ppo prefill", "ppo weights", "ppo decode", "ppo score", "ppo critic", "ppo actor",
        "evaluate weights", "evaluate prefill", "evaluate decode", "evaluate score", "evaluate kl",
    ]  # fmt: skip


def test_options_that_hold_more(plan, programs):
    """Human pairs need no sampling; an average of the actor and minibatches fill memory."""
    other = {p.name: p for p in planned(FSDP, "select.pair_source=human", "ppo.extras.ema_decay=0.9").programs()}
    assert "select decode" not in other
    actor = device_bytes(programs["ppo actor"].arguments({})[0].trainable)
    for name in ("ppo prefill", "ppo score", "ppo critic", "ppo actor"):
        assert device_bytes(other[name].held) == device_bytes(programs[name].held) + actor


def test_ppo_in_one_pass(programs):
    """One program scores and updates: it takes what three others take or hold."""
    joined = {p.name: p for p in planned(FSDP, "ppo.one_pass=true").programs()}
    assert [name for name in programs if name.startswith("ppo") and name not in joined] == [
        "ppo score", "ppo critic", "ppo actor",
    ]  # fmt: skip
    actor, critic, frozen, *_ = joined["ppo update"].arguments({})
    updates = [programs[name].arguments({})[0] for name in ("ppo actor", "ppo critic")]
    assert device_bytes((actor, critic)) == device_bytes(tuple(updates))
    assert device_bytes(frozen) <= device_bytes(programs["ppo actor"].held)
    assert not device_bytes(joined["ppo update"].held)


def test_arguments_are_what_the_stage_would_place(plan, programs):
    """Parameters and both moments divided by eight, and the batch's own rows."""
    state, batch, _ = programs["sft step"].arguments({})
    sizes = [x.size for x in jax.tree.leaves(state.trainable)]
    divided = sum(x.size // 8 if "fsdp" in str(x.sharding.spec) else x.size for x in jax.tree.leaves(state.trainable))
    assert divided < sum(sizes) / 4
    # numbers: the step, two of skips, two counters of the optimiser, and the learning rate
    assert device_bytes(state) == 3 * 4 * divided + 6 * 4
    # two packed rows: four numbers a token, the number of micro-batches, and three of each of two examples
    assert batch.ids.shape == (1, 16, 40 + 16)
    assert device_bytes(batch) == 4 * (4 * 2 * (40 + 16) + 1 + 3 * 2)
    padded = next(planned(FSDP, "text.packed=false").programs(["sft"])).arguments({})[1]
    assert device_bytes(padded) == 2 * 4 * (40 + 1 + 16 + 1 + 1)


@pytest.mark.thorough
def test_compiled_memory_and_traffic(plan, programs):
    (one,) = plan.measure([programs["sft step"]])
    arguments = device_bytes(programs["sft step"].arguments({}))
    assert one.memory is not None and abs(one.memory.arguments - arguments) < 256
    assert one.memory.held == 0, "training holds nothing besides its state and batch"
    assert one.peak == one.memory.peak > arguments
    assert one.fits and one.seconds is None and one.refused is None
    gathered = {t.kind: t for t in one.traffic}["all-gather"]
    matrices = 2 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48)
    # every layer's matrices, in the forward and in the backward pass
    assert gathered.loop_bytes >= 2 * 4 * matrices


@pytest.mark.thorough
def test_decode_takes_the_caches_where_prefill_leaves_them(plan, programs):
    wanted = [programs["ppo prefill"], programs["ppo weights"], programs["ppo decode"]]
    seen = {}
    prefill, _, decode = plan.measure(wanted, end=lambda one: seen.setdefault(one.program.name, one))
    assert list(seen) == ["ppo prefill", "ppo weights", "ppo decode"] and seen["ppo decode"] is decode
    # 40 slots for the prompt, 15 for all tokens of the response but the last
    caches = 2 * 2 * 1 * 2 * (40 + 15) * 8 * 4
    assert prefill.memory is not None and decode.memory is not None
    assert prefill.memory.results >= caches and decode.memory.arguments >= caches
    # donated, so not counted twice
    assert decode.memory.results < caches


@pytest.mark.thorough
def test_refilled_rows_are_planned_as_selection_runs_them(plan, programs):
    """An eighth of the prompts comes in beside the weights for decoding; all rows decode a chunk, in place."""
    wanted = [programs[f"select {part}"] for part in ("weights", "prefill", "decode")]
    weights, prefill, decode = plan.measure(wanted)
    assert weights.memory is not None and prefill.memory is not None and decode.memory is not None
    assert prefill.memory.held == weights.memory.results > 0
    prompts, places = programs["select prefill"].arguments({})[2:4]
    assert prompts.prompt.shape == (8, 40) and places.shape == (16,), "the micro configuration has 16 under way"
    # two samples of 16 prompts over 8 devices, two layers' keys and values of 2 heads of 8 in float32
    caches = 2 * 2 * 4 * 2 * (40 + 15) * 8 * 4
    for one in (prefill, decode):
        assert one.memory.arguments >= caches > one.memory.results, "donated, so not counted twice"


def test_a_plan_is_for_the_target_s_devices():
    with pytest.raises(UserError, match=r"is 4 devices, but a100x8 has 8: add mesh.fsdp=8"):
        planned("mesh.fsdp=4", on="a100x8")
    with pytest.raises(UserError, match=r"but 2xa100x8 has 16: add mesh.data=2 mesh.fsdp=8"):
        planned("mesh.fsdp=4", on="2xa100x8")
    with pytest.raises(UserError, match=r"sft.train.batch_size=20.*does not divide"):
        list(planned(FSDP, "sft.train.batch_size=20").programs())


def test_the_compiler_s_complaint_is_read():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 19.53G of 15.75G hbm. Exceeded hbm capacity by 3.78G."
    )
    assert measure.used_bytes(text, 7) == int(19.53 * 2**30)
    assert measure.used_bytes("INTERNAL: Used 19.53G of 15.75G hbm", 7) is None
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (120.05G) exceeds "
        "available HBM (15.75G)."
    )
    assert measure.used_bytes(text, 7) == int(120.05 * 2**30) + 7


def test_time_is_the_longest_part():
    """A100: 312 TFLOP/s, 2039 GB/s, 300 GB/s links, 25 GB/s network, at the assumed shares."""
    _, share = known()
    target = targets.parse("2xa100x8", cpu_devices=1)
    found = [Traffic("all-gather", 1, 10**9), Traffic("all-reduce", 0, 0, 1, 10**9, network_bytes=10**9)]
    parts = measure.time_parts(Work(16 * 312e12, 0.0, 16 * 2039e9), found, target)
    assert parts is not None
    assert parts["arithmetic"] == pytest.approx(1 / share.matmul)
    assert parts["reading"] == pytest.approx(1 / share.bandwidth)
    # the sum over data crosses the network, and moves its bytes twice
    assert parts["communication"] == pytest.approx((1 / 300 + 2 / 25) / share.link)
    across = measure.time_parts(Work(0.0), [dataclasses.replace(found[0], network_bytes=10**9), found[1]], target)
    assert across is not None and across["communication"] == pytest.approx((1 / 25 + 2 / 25) / share.link)
    assert measure.seconds(Work(1.0), found, targets.parse("cpu", cpu_devices=8)) is None


def test_advice_names_finer_micro_batches_first(programs):
    small = planned(FSDP, on="cpu:0.0001")
    (one,) = small.measure([programs["sft step"]])
    assert not one.fits
    changes = advice.advice(small, one)
    assert changes[0].startswith("sft.train.accumulation=2")
    assert changes[1].startswith("model.remat=full")
    assert any(change.startswith("model.compute_dtype=bfloat16") for change in advice.advice(
        planned(FSDP, "model.compute_dtype=float32"), one
    ))  # fmt: skip


def test_accumulations_divide_the_batch_over_the_mesh():
    plan = planned(FSDP, "sft.train.batch_size=96", "ppo.train.batch_size=64", "ppo.minibatches=2", "text.packed=false")
    assert advice.accumulations(plan, "sft") == [1, 2, 3, 4, 6, 12]
    assert advice.accumulations(plan, "ppo") == [1, 2, 4]
    assert advice.next_accumulation(plan, "sft", 4) == 6
    assert advice.next_accumulation(plan, "sft", 12) is None


def test_accumulations_of_packed_rows_make_the_micro_batch_smaller():
    """By hand: 768 tokens keep a CPU busy, so a micro-batch has 12 rows of 64 columns whenever it may have 12."""
    plan = planned(*WIDE)

    def shape(accumulation: int) -> tuple[int, ...]:
        (update, *_) = plan.changed({"sft": {"train": {"accumulation": accumulation}}}).programs(["sft"])
        return update.arguments({})[1].ids.shape[1:]

    assert [shape(a) for a in (1, 2, 4, 8, 16, 64)] == [(12, 64), (12, 64), (12, 64), (8, 64), (4, 64), (1, 64)]
    assert advice.accumulations(plan, "sft") == [1, 8, 16, 32, 64]
    assert advice.next_accumulation(plan, "sft", 1) == advice.next_accumulation(plan, "sft", 4) == 8
    assert advice.next_accumulation(plan, "sft", 64) is None


@pytest.mark.thorough
@pytest.mark.parametrize("packed", [False, True])
def test_fit_takes_the_fewest_micro_batches_that_fit(packed, monkeypatch):
    """Against compiling every candidate, with a limit between two of them."""
    monkeypatch.setattr(fit, "STAGES", ("sft",))
    monkeypatch.setattr(fit, "REMATS", ("dots",))
    config = load_config(MICRO, (*WIDE, f"text.packed={str(packed).lower()}"))
    unlimited = targets.parse("cpu", cpu_devices=1)
    plan = measure.prepare(config, unlimited).changed({"model": {"remat": "dots"}})
    candidates = advice.accumulations(plan, "sft")[:3]
    monkeypatch.setattr(fit, "accumulations", lambda *_: candidates)
    peaks = [fit._updates(plan, "sft", a)[0].peak for a in candidates]
    assert candidates == ([1, 8, 16] if packed else [1, 2, 4]) and np.all(np.diff(peaks) < 0)
    for limit, expected in [(peaks[0], 1), (peaks[0] - 1, candidates[1]), (peaks[2] - 1, None)]:
        notes: list[str] = []
        (choice,) = fit.search(config, unlimited.model_copy(update={"capacity": float(limit)}), note=notes.append)
        assert choice.accumulation == ({} if expected is None else {"sft": expected})
        assert choice.fits == (expected is not None) and len(notes) <= 2
        assert choice.overrides[0] == "model.remat=dots"


@pytest.mark.parametrize(("on", "extra"), [("a100x8", "plan-gpu"), ("v5p:2x2x2", "plan-tpu")])
def test_a_compiler_that_is_not_installed(on, extra, monkeypatch):
    real = compilers.importlib.util.find_spec
    hidden = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None if name in hidden else real(name))
    with pytest.raises(UserError, match=rf"not installed: pip install 'mpo-jax\[{extra}\]'.*--on cpu"):
        compilers.prepare(targets.parse(on, cpu_devices=1))
