"""`mpo bench`: every workload runs on tiny sizes, and its figures are consistent."""

import json

import numpy as np
import pytest

from mpo_jax.models import flops
from mpo_jax.tools.bench import workloads
from tests.models.tiny import RECORDED
from tests.pipeline.test_pipeline import mpo

pytestmark = pytest.mark.thorough

TINY = [
    "runtime.compilation_cache=null",
    *(f"model.architecture.{key}={value}"
    for key, value in {
        "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
        "max_positions": 64,
    }.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    status = mpo(
        "bench", *TINY, f"workdir={folder}", "--batch", "4", "--steps", "2", "--rows", "8+8", "--vocab", "40",
        "--json", folder / "out.json",
    )  # fmt: skip
    assert status == 0
    return json.loads((folder / "out.json").read_text())


def test_every_workload_has_figures(figures):
    found = {row["name"]: row for row in figures["workloads"]}
    assert list(found) == list(workloads.NAMES)
    for row in found.values():
        assert 0 < row["step_s"]["min"] <= row["step_s"]["median"] <= row["step_s"]["max"]
        assert row["tokens_per_s"] > 0 and row["flop_per_s"] > 0 and row["compile_s"] >= 0 and row["peak_bytes"] > 0
        assert row["real_share_of_tokens"] == 1.0, "rows of given lengths have no padding"
        assert row["share_of_matmul"] == pytest.approx(row["flop_per_s"] / figures["device"]["matmul_flop_per_s"])
        assert row["mfu"] is None, "no vendor's peak is known for a CPU"
    assert figures["rows"] == {"prompt": 8, "response": 8} and figures["dtype"] == "float32"


def test_rates_speak_of_the_same_time(figures):
    """Tokens and FLOPs of a step, over the seconds of a step: 4 rows of 8 + 8 tokens, pairs of 8 + 2 x 8."""
    found = {row["name"]: row for row in figures["workloads"]}
    for name, tokens in {"sft": 4 * 16, "reward": 4 * 24, "dpo": 4 * 24, "generate": 4 * 8}.items():
        row = found[name]
        seconds = tokens / row["tokens_per_s"]
        assert row["step_s"]["min"] <= seconds <= row["step_s"]["max"]
    sizes = flops.DecoderConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        max_positions=64,
    )  # fmt: skip
    needed = 3 * flops.necessary(sizes, np.full(4, 8), np.full((4, 1), 8), "lm")
    assert found["sft"]["flop_per_s"] / found["sft"]["tokens_per_s"] == pytest.approx(needed / (4 * 16))


def test_the_parts_of_a_ppo_iteration_explain_it(figures):
    row = next(row for row in figures["workloads"] if row["name"] == "ppo")
    assert set(row["parts_s"]) == {"rollout", "score", "update"}
    assert 0.5 * row["step_s"]["min"] < sum(row["parts_s"].values()) <= row["step_s"]["max"]


def test_own_rows_are_padded_to_their_buckets(tmp_path):
    """The toy world's rows through their own tokenizer: real tokens are fewer than padded ones."""
    status = mpo(
        "bench", "dpo", *TINY, "data.toy.num_pairs=40", "data.toy.num_demonstrations=40", "data.toy.num_test=4",
        "text.max_prompt_tokens=32", "text.max_response_tokens=24", f"workdir={tmp_path}", "--rows", "data",
        "--batch", "4", "--steps", "2", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert status == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["workloads"]
    assert 0.2 < row["real_share_of_tokens"] < 1.0


@pytest.mark.parametrize("frozen_dtype", ["auto", "int8"])
def test_adapters_are_timed_where_stages_train_them(tmp_path, frozen_dtype):
    """On a base model in every stage; the work counts no gradients of frozen weights."""
    base = ("--rows", "8+8", "--batch", "2", "--steps", "1", f"model.path={RECORDED / 'untied'}", TINY[0])
    for name, more in (("whole", ()), ("adapters", ("model.adapter.rank=2", f"model.frozen_dtype={frozen_dtype}"))):
        file = tmp_path / f"{name}.json"
        assert mpo("bench", "sft", "reward", "dpo", "ppo", *base, *more, "--json", str(file)) == 0
    whole, adapters = (
        {w["name"]: w for w in json.loads((tmp_path / f"{name}.json").read_text())["workloads"]}
        for name in ("whole", "adapters")
    )

    def flops_a_token(row):
        return row["flop_per_s"] / row["tokens_per_s"]

    for stage in ("sft", "reward", "dpo"):
        assert flops_a_token(adapters[stage]) == pytest.approx(2 / 3 * flops_a_token(whole[stage]))
    assert flops_a_token(adapters["ppo"]) < flops_a_token(whole["ppo"])


def test_mistakes_have_status_2(capfd, tmp_path):
    assert mpo("bench", "sfd", f"workdir={tmp_path}") == 2
    assert "no workload is called sfd; choose from sft, reward" in capfd.readouterr().err
    assert mpo("bench", "sft", "--rows", "128x128") == 2
    assert "--rows wants PROMPT+RESPONSE tokens" in capfd.readouterr().err
    assert mpo("bench", "sft", "mesh.fsdp=8", "runtime.cpu_devices=8", "--batch", "4") == 2
    assert "--batch=4 does not divide over mesh.data=1 x mesh.fsdp=8" in capfd.readouterr().err
