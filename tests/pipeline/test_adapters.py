"""Runs with model.adapter: what is trained, saved and exported, and that a stop changes nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.models import loading
from mpo_jax.models.hf import peft, peft_config
from mpo_jax.models.loading import Options
from mpo_jax.runtime.preemption import stopping_at
from mpo_jax.types import merge
from tests.models.tiny import mesh_of
from tests.pipeline.test_pipeline import MICRO, manifest_folder, mpo

pytestmark = pytest.mark.thorough

SETTINGS = "model.adapter.rank=2", "runtime.keep_finished_checkpoints=true", "runtime.tensorboard=false"
ADAPTED = {"reward": "sft", "1-dpo": "sft", "2-ppo": "1-dpo"}
"""The roles that train adapters, with what each adapts; SFT from scratch trains a whole model."""


def run(workdir: Path, command: str = "run", *more: str) -> int:
    return mpo(command, MICRO, *SETTINGS, f"workdir={workdir}", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("adapters")
    assert run(workdir) == 0
    return workdir


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))} for row in rows]


def model_of(folder: Path, role: str) -> dict:
    """A model's parameters as float32 arrays by dotted path."""
    head = "value" if role == "reward" else "lm"
    return merge(loading.load(folder, Options(), mesh_of(1, 1, 1), head=head)[1])


def test_the_first_kl_is_exactly_0(finished):
    """The reference is the actor without its adapter, whose B is 0."""
    first, *later = (row["objective/kl"] for row in lines(manifest_folder(finished, "mpo", "2-ppo")))
    assert first == 0.0 and all(value != 0.0 for value in later)


@pytest.mark.parametrize("role", ADAPTED)
def test_checkpoints_hold_the_adapters_alone_and_the_recipe_names_what_they_adapt(finished, role):
    folder = manifest_folder(finished, "mpo", role)
    newest = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    metadata = json.loads((folder / "checkpoints" / str(newest) / "state" / "_METADATA").read_text())
    paths = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in metadata["tree_metadata"].values()]
    begins = ["actor", "trainable"] if role == "2-ppo" else ["trainable"]
    held = {tuple(path[len(begins) :]) for path in paths if path[: len(begins)] == begins}
    adapters = {path[2] for path in held if path[0] == "layers"}
    assert len(adapters) == 7 and all(name.endswith("_lora") for name in adapters)
    assert {path[0] for path in held} == ({"layers", "score"} if role == "reward" else {"layers"})
    recipe = json.loads((folder / "manifest.json").read_text())
    assert manifest_folder(finished, "mpo", ADAPTED[role]).name in recipe["parents"].values()
    settings = recipe["settings"].get("training", recipe["settings"])
    assert settings["adapter"]["rank"] == 2


@pytest.mark.parametrize("role", ADAPTED)
def test_the_adapter_beside_a_model_makes_that_model(finished, role):
    folder, base = (manifest_folder(finished, "mpo", name) for name in (role, ADAPTED[role]))
    settings = peft_config.read_settings(folder / loading.ADAPTER)
    assert Path(settings.base).resolve() == (base / "model").resolve()
    whole, read = (model_of(folder / name, role) for name in ("model", loading.ADAPTER))
    for kernel, array in whole["layers"]["mlp"].items():
        # summed in another order
        np.testing.assert_allclose(read["layers"]["mlp"][kernel], array, rtol=0, atol=1e-6)
    moved = np.abs(load_file(folder / loading.ADAPTER / peft.WEIGHTS)[f"{peft.PREFIX}{STEM}.lora_B.weight"]).max()
    assert moved > 1e-4


STEM = "model.layers.1.mlp.down_proj"


def test_sft_from_scratch_trains_whole_and_leaves_no_adapter(finished):
    folder = manifest_folder(finished, "mpo", "sft")
    assert not (folder / loading.ADAPTER).exists()
    assert "adapter" not in json.loads((folder / "manifest.json").read_text())["settings"]


@pytest.mark.parametrize(("stage", "role"), [("reward", "reward"), ("dpo", "1-dpo"), ("ppo", "2-ppo")])
def test_a_stop_changes_no_bit(finished, tmp_path, stage, role):
    workdir = Path(shutil.copytree(finished, tmp_path / "w", symlinks=True))
    whole = manifest_folder(finished, "mpo", role)
    for later in list(ADAPTED)[list(ADAPTED).index(role) :]:
        shutil.rmtree(workdir / "stages" / manifest_folder(finished, "mpo", later).name)
    with stopping_at(2):
        assert run(workdir, stage) == 143
    partial = workdir / "stages" / f".{whole.name}.partial"
    assert (partial / "checkpoints" / "2").is_dir() and not (partial / "adapter" / peft.WEIGHTS).exists()
    # the unfinished stage's adapters, alone and folded in
    assert mpo("export", partial, tmp_path / "adapter", "--adapter") == 0
    assert mpo("export", partial, tmp_path / "folded", "--merge") == 0
    alone, folded = (model_of(tmp_path / name, role) for name in ("adapter", "folded"))
    np.testing.assert_allclose(alone["layers"]["mlp"]["up"], folded["layers"]["mlp"]["up"], rtol=0, atol=1e-6)
    # what critic and reward model share goes to host memory and back
    assert run(workdir, stage, "runtime.offload_frozen=true") == 0
    done = workdir / "stages" / whole.name
    assert lines(done) == lines(whole) and "state_hash" in lines(done)[-1]
    for name in ("model/model.safetensors", f"{loading.ADAPTER}/{peft.WEIGHTS}"):
        assert (done / name).read_bytes() == (whole / name).read_bytes()


def test_an_unfinished_stage_is_exported_on_the_weights_that_it_was_trained_on(finished, tmp_path):
    """With int8, that is the rounded base, as in the finished model."""
    workdir, int8 = Path(shutil.copytree(finished, tmp_path / "w", symlinks=True)), "model.frozen_dtype=int8"
    before = {path.name for path in (workdir / "stages").iterdir()}
    last = len(lines(manifest_folder(finished, "mpo", "1-dpo")))
    assert run(workdir, "select", int8) == 0
    with stopping_at(last):
        assert run(workdir, "dpo", int8) == 143
    (partial,) = (workdir / "stages").glob(".dpo-*.partial")
    assert mpo("export", partial, tmp_path / "folded", "--merge") == 0
    assert run(workdir, "dpo", int8) == 0
    (done,) = (path for path in (workdir / "stages").glob("dpo-*") if path.name not in before)
    whole, folded = (
        model_of(folder, "1-dpo")["layers"]["mlp"]["up"] for folder in (done / "model", tmp_path / "folded")
    )
    exact = model_of(done / loading.ADAPTER, "1-dpo")["layers"]["mlp"]["up"]
    np.testing.assert_allclose(folded, whole, rtol=0, atol=1e-6)
    assert np.abs(exact - whole).max() > 1e-4, "the rounding of int8"


def test_an_adapter_whose_base_is_gone_can_be_exported_alone(finished, tmp_path, capsys):
    workdir = Path(shutil.copytree(finished, tmp_path / "w", symlinks=True))
    shutil.rmtree(workdir / "stages" / manifest_folder(finished, "mpo", "1-dpo").name / "model")
    ppo = workdir / "stages" / manifest_folder(finished, "mpo", "2-ppo").name
    settings = json.loads((ppo / loading.ADAPTER / peft_config.CONFIG).read_text())
    gone = str(workdir / "gone")
    (ppo / loading.ADAPTER / peft_config.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": gone}))
    assert mpo("export", ppo, tmp_path / "adapter", "--adapter") == 0
    written = (tmp_path / "adapter" / peft.WEIGHTS).read_bytes()
    assert written == (ppo / loading.ADAPTER / peft.WEIGHTS).read_bytes()
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"one stage changed in {gone}, and is of use on that model alone, which is not there")


def test_adapters_of_a_base_that_has_changed_are_not_folded_into_it(finished, tmp_path, capsys):
    """Those of an unfinished stage, whose base is no stage's but the user's."""
    base = Path(shutil.copytree(manifest_folder(finished, "mpo", "sft") / "model", tmp_path / "base"))
    with stopping_at(2):
        assert run(tmp_path / "w", "sft", f"model.path={base}") == 143
    (partial,) = (tmp_path / "w" / "stages").glob(".sft-*.partial")
    assert mpo("export", partial, tmp_path / "folded") == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors")
    capsys.readouterr()
    assert mpo("export", partial, tmp_path / "wrong") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{base} has changed since {partial.name} began" in said and not (tmp_path / "wrong").exists()
    assert mpo("export", partial, tmp_path / "adapter", "--adapter") == 0


def test_what_an_adapter_s_export_cannot_do_is_said(finished, tmp_path, capsys):
    run_folder = finished / "runs" / "mpo"
    assert mpo("export", run_folder, tmp_path / "half", "--adapter", "--dtype", "bfloat16") == 2
    assert "--dtype bfloat16 and --adapter together" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert mpo("export", run_folder, tmp_path / "link") == 2
    assert "link is a link, which is left alone: name a new folder" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_critic_has_no_adapters_of_its_own_to_export(finished, tmp_path, capsys):
    assert mpo("export", finished / "runs" / "mpo", tmp_path / "critic", "--critic", "--adapter") == 2
    assert "saves its critic as a whole model, so export it without" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "critic").exists()


def test_export_of_a_finished_stage(finished, tmp_path, capsys):
    run_folder = finished / "runs" / "mpo" / "2-ppo"
    assert mpo("export", run_folder, tmp_path / "adapter", "--adapter") == 0
    assert mpo("export", run_folder, tmp_path / "merged", "--merge") == 0
    written = (tmp_path / "adapter" / peft.WEIGHTS).read_bytes()
    assert written == (run_folder / loading.ADAPTER / peft.WEIGHTS).read_bytes()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "A PEFT adapter of a language model in float32: the final policy" in card
    # the adapter is the last stage's alone, and names the model before it wherever it is used
    base = str((finished / "runs" / "mpo" / "1-dpo" / "model").resolve())
    assert json.loads((tmp_path / "adapter" / peft_config.CONFIG).read_text())["base_model_name_or_path"] == base
    assert f"## Base model\n\n`{base}`. The adapter is what the last stage" in card and " DIR --adapter\n" in card
    said = " ".join(capsys.readouterr().out.split())
    assert f"one stage changed in {base}, and is of use on that model alone; --merge writes a whole model" in said
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "DIR\n" in card and base not in card and "--adapter" not in card
    # a PEFT folder goes the same ways
    assert mpo("export", tmp_path / "adapter", tmp_path / "again", "--adapter") == 0
    assert (tmp_path / "again" / peft.WEIGHTS).read_bytes() == written
    assert " DIR --adapter\n" in (tmp_path / "again" / "README.md").read_text()
    settings = tmp_path / "again" / peft_config.CONFIG
    settings.write_text(settings.read_text().replace(base, "elsewhere/than/here"))
    assert mpo("generate", tmp_path / "again", "hello") == 2
    message = f"{settings}: base_model_name_or_path=elsewhere/than/here: no such folder or file, and no hub id"
    assert message in " ".join(capsys.readouterr().err.split())
    assert mpo("export", tmp_path / "adapter", tmp_path / "whole") == 0
    assert (tmp_path / "whole" / "config.json").is_file()
    assert load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert mpo("export", finished / "runs" / "mpo" / "sft", tmp_path / "none", "--adapter") == 2
    assert "has no adapters: it was trained whole (model.adapter)" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()


def test_verify_retrains_adapters(finished, capsys):
    assert mpo("verify", finished) == 0
    said = " ".join(capsys.readouterr().out.split())
    for role in ADAPTED:
        assert f"{manifest_folder(finished, 'mpo', role).name}: steps 2 to " in said
    assert said.count(" identical (state_hash ") == 4


def test_a_peft_folder_is_a_base_model(finished, tmp_path):
    """Its files, and those of its base, take part in the names of stages."""
    adapter = Path(shutil.copytree(finished / "runs" / "mpo" / "1-dpo" / loading.ADAPTER, tmp_path / "adapter"))
    settings = *SETTINGS, f"model.path={adapter}", "sft.train.steps=2"
    assert mpo("sft", MICRO, *settings, f"workdir={tmp_path / 'one'}") == 0
    (sft,) = tmp_path.glob("one/stages/sft-*")
    # SFT of a base model trains an adapter of its own
    assert peft_config.read_settings(sft / loading.ADAPTER).base == str(adapter)
    written = json.loads((adapter / peft_config.CONFIG).read_text())
    other = shutil.copytree(written["base_model_name_or_path"], tmp_path / "other")
    (other / "generation_config.json").write_text('{"temperature": 0.5}')
    (adapter / peft_config.CONFIG).write_text(json.dumps(written | {"base_model_name_or_path": str(other)}))
    assert mpo("sft", MICRO, *settings, f"workdir={tmp_path / 'two'}") == 0
    assert next(tmp_path.glob("two/stages/sft-*")).name != sft.name
