"""Attention kernels by the targets' own compilers: `bash launch/setup.sh test plan-gpu plan-tpu`, then `-m plan`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.plan.test_compilers import MICRO, gpu, plan, step_of, tpu

pytestmark = pytest.mark.plan

ROOT = Path(__file__).parents[3]
HEAD_DIMS = (64, 80, 96, 128, 256)
SIZES = ("--attention", "pallas", "--rows", "2", "--columns", "1000", "--heads", "4", "--kv-heads", "2")


def compile_kernels(*arguments: object) -> list[dict]:
    """Programs of attention alone, forward and backward."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "benchmarks" / "attention_plan.py", *map(str, arguments), *SIZES, "--json"],
        capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


TARGETS = [
    pytest.param("a100x1", marks=gpu),
    pytest.param("h100x1", marks=gpu),
    pytest.param("v5e:1x1", marks=tpu),
    pytest.param("v5p:1x1x1", marks=tpu),
]


@pytest.mark.parametrize("on", TARGETS)
def test_every_head_dimension(on):
    found = compile_kernels(on, "--head-dims", *HEAD_DIMS)
    assert [program["head_dim"] for program in found] == list(HEAD_DIMS)
    assert all(program["kernels"] for program in found)


@pytest.mark.parametrize("on", TARGETS)
def test_a_window_and_a_soft_cap_in_float32(on):
    options = ("--dtype", "float32", "--precision", "highest", "--window", 100, "--soft-cap", 30)
    assert [program["head_dim"] for program in compile_kernels(on, "--head-dims", 64, 128, *options)] == [64, 128]


@pytest.mark.parametrize("on", [pytest.param("h100x4", marks=gpu), pytest.param("v5e:2x2", marks=tpu)])
def test_rows_and_heads_are_divided_over_devices(on):
    """Two rows of four heads a device, as on one device with half the heads."""
    (program,) = compile_kernels(on, "--head-dims", 128)
    assert program["kernels"]


@gpu
def test_a_model_s_programs_on_gpus(tmp_path):
    """On a mesh with a tensor axis."""
    options = ("mesh.fsdp=4", "mesh.tensor=2", "model.attention=pallas")
    status, found = plan(tmp_path, MICRO, *options, "--on", "a100x8", "--stage", "sft")
    assert status == 0 and step_of(found)["fits"]


@tpu
def test_a_model_s_programs_on_tpus(tmp_path):
    """`auto` is the kernel there."""
    status, found = plan(tmp_path, MICRO, "mesh.fsdp=4", "--on", "v5e:2x2", "--stage", "sft")
    assert status == 0 and step_of(found)["fits"]
