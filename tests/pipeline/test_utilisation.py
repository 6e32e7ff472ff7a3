"""`perf/mfu` of every training stage: there on devices whose peak is known, without a trace in anything else."""

import json
from pathlib import Path

import pytest

from mpo_jax.models import flops
from mpo_jax.models.hf import families
from mpo_jax.runtime import device_kinds
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.thorough

PEAK = 1e9
ROLES = {"sft": 1, "reward": 1, "1-dpo": 1, "2-ppo": 3}
"""Training stages, and their products in those of one model's update: PPO updates two models, and the passes of
reference and reward model and the drawing are as much as a third."""


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> tuple[Path, Path]:
    """The micro run on this CPU, and on devices that pass for ones of a known peak."""
    plain, known = (tmp_path_factory.mktemp(name) for name in ("plain", "known"))
    assert mpo("run", MICRO, f"workdir={plain}") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_kinds, "peak_flops", lambda devices: PEAK * len(list(devices)))
        assert mpo("run", MICRO, f"workdir={known}") == 0
    return plain, known


def lines(workdir: Path, role: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / f"runs/mpo/{role}/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("role", ROLES)
def test_every_training_stage_says_how_fast_it_is(workdirs, role):
    """A token's FLOPs are those of the matrices, and at most attention over a whole row and the logits besides."""
    plain, known = (lines(workdir, role) for workdir in workdirs)
    sizes = families.read_config(workdirs[0] / f"runs/mpo/{role}/model")
    least = 6 * flops.layer_matrices(sizes)
    most = least + 6 * sizes.vocab_size * sizes.hidden_size
    most += 3 * 4 * sizes.num_layers * sizes.num_heads * sizes.head_dim * sizes.max_positions
    timed = [line for line in known if "timing_s/step" in line]
    assert timed
    for line in timed:
        assert 0 < line["perf/padding"] < 1
        each = PEAK * line["perf/mfu"] / line["perf/tokens_per_s"]
        assert 0.99 * ROLES[role] * least < each < ROLES[role] * most
    # only the first of the two runs compiles its programs
    names = [[set(line) - {"timing_s/compile"} for line in lines] for lines in (plain, known)]
    assert names[0] == [line - {"perf/mfu"} for line in names[1]] and not any("perf/mfu" in line for line in names[0])


@pytest.mark.parametrize("role", ROLES)
def test_nothing_else_changes(workdirs, role):
    """To the bit: metrics, and the hashes of the states."""
    plain, known = (
        [{k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))} for line in lines(workdir, role)]
        for workdir in workdirs
    )
    assert plain == known and any("state_hash" in line for line in plain)
