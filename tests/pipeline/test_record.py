"""`runs/<name>`: a run that was made in part links what there is, and leaves a longer run of the same artifacts."""

import json
from pathlib import Path

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.pipeline.pipeline import Pipeline, Run
from mpo_jax.pipeline.table import Listing
from mpo_jax.types import Artifact
from tests.pipeline.test_pipeline import MICRO


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    return Pipeline(load_config(MICRO, (f"workdir={tmp_path}",)), Listing(tmp_path))


def run(workdir: Path, **artifacts: str) -> Run:
    made = {role.removeprefix("_").replace("_", "-"): name for role, name in artifacts.items()}
    for name in made.values():
        (workdir / "stages" / name).mkdir(parents=True, exist_ok=True)
        (workdir / "stages" / name / "manifest.json").write_text(json.dumps({"stage": name.split("-")[0]}))
    return Run("mpo", {role: Artifact(workdir / "stages" / name, {}) for role, name in made.items()})


def links(workdir: Path) -> dict[str, str]:
    return {link.name: link.resolve().name for link in (workdir / "runs" / "mpo").iterdir() if link.is_symlink()}


def test_a_run_in_part_is_linked(pipeline, tmp_path):
    pipeline.record(run(tmp_path, sft="sft-a"))
    assert links(tmp_path) == {"sft": "sft-a"}
    assert load_config(tmp_path / "runs" / "mpo" / "config.yaml") == pipeline.config
    pipeline.record(run(tmp_path, sft="sft-a", _1_dpo="dpo-a"))
    pipeline.record(run(tmp_path, sft="sft-a"))
    assert links(tmp_path) == {"sft": "sft-a", "1-dpo": "dpo-a"}


def test_a_finished_run_stays_unless_the_part_is_another(pipeline, tmp_path, capsys):
    pipeline.record(run(tmp_path, sft="sft-a", _1_dpo="dpo-a", evaluate="evaluate-a"))
    kept = links(tmp_path)
    pipeline.record(run(tmp_path, sft="sft-a", _1_dpo="dpo-a"))
    assert links(tmp_path) == kept and not capsys.readouterr().out
    pipeline.record(run(tmp_path, sft="sft-a", _1_dpo="dpo-b"))
    assert links(tmp_path) == {"sft": "sft-a", "1-dpo": "dpo-b"}
    assert "had a finished run, of other settings" in " ".join(capsys.readouterr().out.split())
