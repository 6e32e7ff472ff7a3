"""`mpo verify` through the real command line: the same bits are found identical, and a change is found by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file, save_file

from mpo_jax.config.load import load_config
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A workdir whose trained stages kept their checkpoints; SFT's and DPO's only one each."""
    workdir = tmp_path_factory.mktemp("made")
    options = (
        "runtime.keep_finished_checkpoints=true",
        "sft.train.keep_checkpoints=1",
        "dpo.train.steps=3",
        "ppo.train.steps=5",
    )
    assert mpo("ppo", MICRO, f"workdir={workdir}", *options) == 0
    return workdir


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def folder_of(workdir: Path, stage: str) -> Path:
    (folder,) = workdir.glob(f"stages/{stage}-*")
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_every_stage_is_identical(made, capsys):
    """From checkpoint to checkpoint, and from the only checkpoint to the hash recorded at the end."""
    before = sorted(path.relative_to(made) for path in made.rglob("*") if "lock" not in path.suffix)
    assert mpo("verify", made) == 0
    out = said(capsys)
    for stage, steps in {"sft": "4 to 6", "reward": "2 to 4", "dpo": "2 to 3", "ppo": "2 to 4"}.items():
        folder = folder_of(made, stage)
        recorded = {row["step"]: row.get("state_hash", "") for row in rows(folder)}
        assert f"{folder.name}: steps {steps} identical (state_hash {recorded[int(steps[-1])][:12]})" in out
    assert sorted(path.relative_to(made) for path in made.rglob("*") if "lock" not in path.suffix) == before


def test_a_table_is_verified_seed_by_seed(made, tmp_path, capsys):
    """A stage that seeds share has its checkpoints in one; copies that both have made are both trained again."""
    for seed in (0, 1):
        shutil.copytree(made, tmp_path / f"seed-{seed}")
    assert mpo("verify", tmp_path, "--stage", "dpo") == 0
    assert said(capsys).count(" identical (state_hash ") == 2
    shutil.rmtree(folder_of(tmp_path / "seed-0", "dpo") / "checkpoints")
    assert mpo("verify", tmp_path, "--stage", "dpo") == 0
    out = said(capsys)
    assert out.count(" identical (state_hash ") == 1 and "fewer than" not in out
    for seed in (0, 1):
        shutil.rmtree(tmp_path / f"seed-{seed}" / "stages")
    assert mpo("verify", tmp_path) == 2


def test_stored_checkpoints_by_sha256(made, copied, capsys):
    """Another checkpoint in the end's place is found by name; one checkpoint alone is not enough."""
    assert mpo("verify", made, "--sha256") == 0
    out = said(capsys)
    assert f"{folder_of(made, 'ppo').name}: steps 2 to 4 identical (sha256 " in out and out.count("identical") == 1
    assert f"{folder_of(made, 'sft').name}: fewer than two checkpoints are stored" in out
    end = folder_of(copied, "ppo") / "checkpoints" / "4"
    shutil.rmtree(end)
    shutil.copytree(end.with_name("2"), end)
    assert mpo("verify", copied, "--stage", "ppo", "--sha256") == 1
    assert "steps 2 to 4 differ: sha256" in (out := said(capsys))
    assert "the first leaf that differs is actor.opt_state.count" in out


@pytest.mark.parametrize("by", ["kind", "name"])
def test_one_stage_can_be_asked_for(made, capsys, by):
    name = folder_of(made, "reward").name
    assert mpo("verify", made, "--stage", "reward" if by == "kind" else name) == 0
    out = said(capsys)
    assert f"{name}: steps 2 to 4 identical" in out and out.count("identical") == 1


def test_what_is_trained_again_is_not_logged_to_wandb_again(copied):
    path = folder_of(copied, "reward") / "config.yaml"
    path.write_text(path.read_text().replace("  wandb: null\n", "  wandb: {mode: offline}\n"))
    assert load_config(path).runtime.wandb is not None
    assert mpo("verify", copied, "--stage", "reward") == 0
    assert not (copied / "wandb").exists()


def test_another_input_is_found_with_the_first_leaf_that_differs(copied, capsys):
    """PPO's reward model is changed a little: the critic's gradients are others, and then its moments and all else."""
    path = folder_of(copied, "reward") / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["score.weight"] = tensors["score.weight"] + np.float32(0.5)
    save_file(tensors, path, metadata={"format": "pt"})
    assert mpo("verify", copied, "--stage", "ppo") == 1
    out = said(capsys)
    assert "steps 2 to 4 differ: state_hash" in out and "the first leaf that differs is .actor.trainable" in out


def test_a_record_that_was_changed_is_told(copied, capsys):
    """A hash at a checkpoint, and one of a step without."""
    for stage, step in (("ppo", 4), ("sft", 6)):
        path = folder_of(copied, stage) / "metrics.jsonl"
        changed = [{**row, "state_hash": "0" * 64} if row["step"] == step else row for row in rows(path.parent)]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert mpo("verify", copied) == 1
    out = said(capsys)
    assert "steps 4 to 6 differ: state_hash 000000000000 was recorded" in out
    assert "which leaf differs is not recorded" in out
    assert "steps 2 to 4 differ: state_hash 000000000000 was recorded" in out
    assert "so the recorded hash is wrong" in out
    assert out.count("identical") == 2, "the other stages are checked all the same"


def test_an_unfinished_stage_is_verified_too(copied, capsys):
    """As a kill leaves it: the hidden folder, and a line half-written."""
    folder = folder_of(copied, "ppo")
    manifest = json.loads((folder / "manifest.json").read_text())
    recipe = {key: manifest[key] for key in ("format", "stage", "settings", "inputs", "parents")}
    (folder / "manifest.json").unlink()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    assert mpo("verify", copied, "--stage", "ppo") == 0
    assert f"{folder.name}: steps 2 to 4 identical" in said(capsys)
    with FileLock(copied / "stages" / f".{folder.name}.lock"):
        assert mpo("verify", copied, "--stage", folder.name) == 2
    assert "another run is making it right now" in said(capsys)


def test_without_stored_states_it_says_what_to_set(copied, capsys):
    for stage in ("sft", "reward"):
        shutil.rmtree(folder_of(copied, stage) / "checkpoints")
    assert mpo("verify", copied, "--stage", "sft") == 2
    captured = capsys.readouterr()
    assert "runtime.keep_finished_checkpoints=true" in " ".join(captured.out.split())
    assert "no stage sft with two stored states to compare" in captured.err
    assert mpo("verify", copied, "--stage", "sfft") == 2
    assert mpo("verify", copied / "nowhere") == 2


def test_a_checkpoint_that_cannot_be_read_ends_no_other_check(copied, capsys):
    folder = folder_of(copied, "ppo") / "checkpoints" / "2" / "state"
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)
    assert mpo("verify", copied) == 2
    captured = capsys.readouterr()
    assert captured.out.count(" identical (state_hash ") == 3
    assert f"{folder.parent} cannot be read (only a copy of it was removed): delete this folder" in captured.err
    assert folder.is_dir()


def test_an_input_that_changed_is_named(copied, capsys):
    """Where the result is another; pairs, which SFT does not read, may change."""
    path = folder_of(copied, "sft") / "config.yaml"
    text = path.read_text()
    (row,) = [line for line in text.splitlines() if line.strip().startswith("num_demonstrations:")]
    path.write_text(text.replace(row, row.partition(":")[0] + ": 77"))
    assert mpo("verify", copied, "--stage", "sft") == 2
    assert "the rows of the section data changed since it was trained" in capsys.readouterr().err


def test_an_input_that_is_gone_is_named(copied, capsys):
    shutil.rmtree(folder_of(copied, "reward"))
    assert mpo("verify", copied, "--stage", "ppo") == 2
    assert "its reward" in (error := capsys.readouterr().err) and "is missing" in error
