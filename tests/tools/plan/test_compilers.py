"""Plans by the targets' own compilers, from wheels: `bash launch/setup.sh test plan-gpu plan-tpu`, then `-m plan`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.test_pipeline import MICRO

pytestmark = pytest.mark.plan

CONFIGS = Path(__file__).parents[3] / "configs"
COMMAND = [sys.executable, "-c", "from mpo_jax.cli.app import main; main()", "plan"]
HH = CONFIGS / "hh_llama2_7b.yaml"


def plan(folder: Path, *arguments: object) -> tuple[int, dict]:
    file = folder / "plan.json"
    done = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json", str(file)],
        capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": ""},
    )  # fmt: skip
    assert file.is_file(), done.stdout + done.stderr
    return done.returncode, json.loads(file.read_text())


def step_of(found: dict) -> dict:
    """SFT's update, of the programs of its stage."""
    (step,) = (program for program in found["programs"] if program["name"] == "sft step")
    return step


def needs(module: str, extra: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"no {module}: launch/setup.sh {extra}")


gpu = needs("jax_cuda12_plugin", "plan-gpu")
tpu = needs("libtpu", "plan-tpu")


@gpu
@pytest.mark.parametrize("on", ["a100x8", "h100x8"])
def test_every_program_of_a_small_model_on_gpus(tmp_path, on):
    status, found = plan(tmp_path, MICRO, "mesh.fsdp=8", "--on", on)
    assert status == 0 and len(found["programs"]) == 21
    assert all(program["fits"] and program["estimate_s"] > 0 for program in found["programs"])
    step = step_of(found)
    assert {c["kind"] for c in step["collectives"]} >= {"all-gather", "all-reduce"}


@gpu
@pytest.mark.parametrize(("packed", "micro_batches"), [("true", 3), ("false", 1)])
def test_a_7b_step_on_eight_a100(tmp_path, packed, micro_batches):
    """Parameters and moments are 12 bytes each over 8 devices, and every layer is gathered in both passes.

    Six packed rows of 1024 columns keep a device busy, so that 128 rows take three micro-batches, as is assumed of the
    loop's length. Inside it embedding and head, of 131 million numbers, are gathered three times.
    """
    status, found = plan(tmp_path, HH, "--on", "a100x8", "--stage", "sft", f"text.packed={packed}")
    step = step_of(found)
    assert status == 0 and step["fits"]
    state = 12 * 6_738_415_616 / 8
    assert state < step["memory"]["arguments"] < 1.01 * state
    assert state + step["memory"]["held"] < step["peak"] < 80e9
    gathered = next(c for c in step["collectives"] if c["kind"] == "all-gather")
    assert gathered["exact"] == (packed == "false")
    each = 2 * 2 * 6_476_005_376 + (3 * 2 * 131_072_000 if packed == "true" else 0)
    assert gathered["loop_bytes"] == pytest.approx(micro_batches * each, rel=0.01)


@gpu
def test_a_7b_step_does_not_fit_the_small_a100(tmp_path):
    """Of padded rows, 16 at a time; packed micro-batches are less than half of that, and fit."""
    status, found = plan(tmp_path, HH, "--on", "a100-40x8", "--stage", "sft", "text.packed=false")
    step = step_of(found)
    assert status == 3 and not step["fits"]
    assert step["advice"][0].startswith("sft.train.accumulation=2")
    status, found = plan(tmp_path, HH, "--on", "a100-40x8", "--stage", "sft")
    assert status == 0 and step_of(found)["fits"]


@gpu
def test_two_hosts_of_gpus(tmp_path):
    status, found = plan(tmp_path, MICRO, "mesh.data=2", "mesh.fsdp=8", "--on", "2xa100x8", "--stage", "sft")
    assert status == 0 and found["devices"] == 16


@tpu
@pytest.mark.parametrize(
    ("on", "mesh"),
    [
        ("v5p:2x2x2", ("mesh.fsdp=8",)),
        ("v5e:2x4", ("mesh.fsdp=8",)),
        ("v4:2x2x2", ("mesh.fsdp=8",)),
        ("2xv5e:2x4", ("mesh.data=2", "mesh.fsdp=8")),
        ("v5p:1x1x1", ()),
    ],
)
def test_a_small_model_on_tpus(tmp_path, on, mesh):
    status, found = plan(tmp_path, MICRO, *mesh, "--on", on, "--stage", "sft")
    step = step_of(found)
    assert status == 0 and step["fits"] and step["peak"] > step["memory"]["arguments"] > 0


@tpu
def test_the_tpu_s_compiler_gives_up_where_memory_ends(tmp_path):
    """A 7B model's state is 20 GiB on each of four chips of 16 GiB."""
    status, found = plan(tmp_path, HH, "mesh.fsdp=4", "--on", "v5e:2x2", "--stage", "sft")
    step = step_of(found)
    assert status == 3 and step["memory"] is None and step["peak"] > step["usable"]
