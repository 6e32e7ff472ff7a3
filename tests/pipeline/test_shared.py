"""Stages that the seeds of a table share: listed once, made once, and each seed's own on disk."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config
from mpo_jax.data import toy
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import Damaged
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.disk import disk_use
from mpo_jax.pipeline.keeping import remove_models
from mpo_jax.pipeline.recipe import make_recipe
from mpo_jax.pipeline.shared import place_of
from mpo_jax.pipeline.table import Listing, table_stages
from mpo_jax.types import Artifact, trainable
from tests.models.tiny import RECORDED, random_params
from tests.pipeline.test_pipeline import MICRO

RECIPE = make_recipe("sft", {"seed": 0}, {"data": "d"}, {})


def never(folder: Path) -> dict[str, Any]:
    pytest.fail(f"makes {folder}")


@pytest.fixture
def first(tmp_path: Path) -> Artifact:
    """The stage as seed 0 has made it, with a model, checkpoints that it keeps, and a summary."""

    def make(folder: Path) -> dict[str, Any]:
        for name in ("model/weights", "checkpoints/3/state"):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(name)
        save_file({"a": np.zeros(2, np.float32)}, folder / "model" / "model.safetensors")
        return {"steps": 3}

    made = Store(tmp_path / "seed-0").build(RECIPE, make)
    (made.path / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
    (made.path / "checkpoints" / "3" / "state").write_text("kept")
    return made


def test_a_seed_takes_what_another_has_finished(first: Artifact, tmp_path: Path) -> None:
    begun = tmp_path / "seed-1" / "stages" / f".{first.id}.partial"
    begun.mkdir(parents=True)
    store = Store(tmp_path / "seed-1")
    taken = store.build(RECIPE, never)
    assert taken.id == first.id and taken.path == tmp_path / "seed-1" / "stages" / first.id
    assert taken.manifest == first.manifest
    assert (store.made, store.reused) == ([], [first.id])
    # a second time it is this seed's own; what it had begun, and the other's checkpoints, are not there
    assert Store(tmp_path / "seed-1").build(RECIPE, never) == taken
    assert [path.name for path in store.folder.iterdir() if not path.name.endswith(".lock")] == [first.id]
    assert sorted(path.name for path in taken.path.iterdir()) == ["manifest.json", "model"]


def test_what_is_taken_needs_no_space_and_outlives_its_source(first: Artifact, tmp_path: Path) -> None:
    taken = Store(tmp_path / "seed-1").build(RECIPE, never)
    weights = taken.path / "model" / "weights"
    assert weights.samefile(first.path / "model" / "weights")
    # a model that one seed removes stays the other's, and so does its manifest
    assert remove_models(first.path) > 0
    assert weights.read_text() == "model/weights" and "removed" not in json.loads(
        (taken.path / "manifest.json").read_text()
    )
    shutil.rmtree(tmp_path / "seed-0")
    assert Store(tmp_path / "seed-1").build(RECIPE, never) == taken


def test_disks_without_links_get_copies(first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    taken = Store(tmp_path / "seed-1").build(RECIPE, never)
    copy = taken.path / "model" / "weights"
    assert copy.read_text() == "model/weights" and not copy.samefile(first.path / "model" / "weights")


def test_what_a_kill_left_half_taken_is_no_obstacle(first: Artifact, tmp_path: Path) -> None:
    half = tmp_path / "seed-1" / "stages" / f".{first.id}.taken"
    (half / "model").mkdir(parents=True)
    (half / "model" / "rest").write_text("of before")
    taken = Store(tmp_path / "seed-1").build(RECIPE, never)
    assert not half.exists() and not (taken.path / "model" / "rest").exists()


def test_other_folders_and_other_recipes_share_nothing(first: Artifact, tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        return {}

    Store(tmp_path / "elsewhere").build(RECIPE, make)
    Store(tmp_path / "seed-x").build(RECIPE, make)
    Store(tmp_path / "seed-1").build({**RECIPE, "settings": {"seed": 1}}, make)
    assert len(made) == 3


def test_a_stage_without_its_model_is_made_anew(first: Artifact, tmp_path: Path) -> None:
    remove_models(first.path)
    folder = tmp_path / "seed-1" / "stages" / first.id
    assert place_of(folder) == folder
    made = Store(tmp_path / "seed-1").build(RECIPE, lambda folder: {"anew": True})
    assert made.manifest["summary"] == {"anew": True}


def test_a_damaged_stage_of_another_seed_is_named(first: Artifact, tmp_path: Path) -> None:
    (first.path / "manifest.json").write_text("{")
    with pytest.raises(Damaged, match="seed-0"):
        Store(tmp_path / "seed-1").build(RECIPE, never)


@pytest.mark.parametrize("left", [b"\x10", None, ...])
def test_a_model_that_cannot_be_read_is_not_taken(first: Artifact, tmp_path: Path, left: Any) -> None:
    """Torn weights, none, or no model at all."""
    weights = first.path / "model" / "model.safetensors"
    if isinstance(left, bytes):
        weights.write_bytes(left)
    else:
        weights.unlink()
    if left is ...:
        shutil.rmtree(first.path / "model")
    with pytest.raises(Damaged, match=r"seed-0.* has no model that can be read .*: delete the folder .*seed-0"):
        Store(tmp_path / "seed-1").build(RECIPE, never)
    assert not (tmp_path / "seed-1" / "stages" / first.id).exists()


def test_what_is_in_a_stage_s_way_is_not_hidden_by_another_seed_s(first: Artifact, tmp_path: Path) -> None:
    half = tmp_path / "seed-1" / "stages" / first.id
    half.mkdir(parents=True)
    assert place_of(half) == half
    with pytest.raises(Damaged, match="seed-1"):
        Listing(tmp_path / "seed-1").build(RECIPE, never)


def configure(folder: Path, *overrides: str) -> Config:
    """A table of two seeds on a row from a file."""
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"}) + "\n")
    rows = ("data.kind=pairs", f"data.path={folder}/rows.jsonl", f"model.path={RECORDED / 'tied'}")
    runs = ("table.seeds=0,1", "table.experiment=sft,dpo_base")
    return load_config(MICRO, (*rows, *runs, f"workdir={folder}/work", *overrides))


def listed(config: Config) -> dict[str, list[int]]:
    """The seeds of the stages that a table lists, by kind."""
    found: dict[str, list[int]] = {}
    for stage in table_stages(config):
        found.setdefault(stage.kind, []).append(stage.seed)
    return found


def test_seeds_list_what_they_share_once(tmp_path: Path) -> None:
    own = {"sft": [0, 1], "reward": [0, 1], "dpo": [0, 1], "evaluate": [0, 0, 1, 1]}
    assert listed(configure(tmp_path)) == own
    assert listed(configure(tmp_path, "sft.seed=0")) == own | {"sft": [0]}
    # the reward model is made from the SFT model
    assert listed(configure(tmp_path, "reward.seed=0")) == own
    assert listed(configure(tmp_path, "sft.seed=0", "reward.seed=0")) == own | {"sft": [0], "reward": [0]}
    # every seed of the toy world has other rows
    toys = load_config(MICRO, ("table.seeds=0,1", "table.experiment=sft", "sft.seed=0", f"workdir={tmp_path}/toy"))
    assert listed(toys)["sft"] == [0, 1]


def test_what_any_seed_has_is_there_and_takes_its_space_once(tmp_path: Path) -> None:
    config = load_config(MICRO)
    codec = TextCodec(toy.make_tokenizer(), config.text)
    decoder = loading.scratch_sizes(config.model.architecture, codec.vocab_size)
    loading.save(tmp_path / "policy", Model(decoder), trainable(random_params(decoder)), codec.tokenizer)
    config = configure(tmp_path, f"model.path={tmp_path}/policy", "sft.seed=0", "reward.seed=0")
    planned = next(stage for stage in table_stages(config) if stage.kind == "sft")
    assert not planned.is_there

    def make(folder: Path) -> dict[str, Any]:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(bytes(1000))
        return {}

    # seed 1 ran first, as it may have on another day
    made = Store(tmp_path / "work" / "seed-1").build(planned.recipe, make)
    stages = table_stages(config)
    found = next(stage for stage in stages if stage.kind == "sft")
    assert made.id == planned.name and found.seed == 0 and found.is_there
    use = disk_use(config, stages)
    assert use.sizes[planned.name].model == 1000 and use.there == use.sizes[planned.name].kept
