"""Model cards: what made a model is found from its folder, and the card says it."""

import json
from pathlib import Path

import pytest
import yaml

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config
from mpo_jax.tools.report.card import CONFIG_FILE, find_origin, write_card
from tests.tools.report import workdirs


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Finished runs whose stages know their parents as real ones do."""
    config = Config(workdir="w", experiment=("mpo",), seed=3)
    made = workdirs.make(tmp_path, ("sft", "mpo"), configs={"sft": config, "mpo": config})
    lineage = {
        "sft-1": ({}, {}), "reward-1": ({"sft": "sft-1"}, {}),
        "dpo-mpo": ({"init": "sft-1", "reference": "sft-1"}, {"split": {"subset": "easy"}}),
        "ppo-mpo": ({"init": "dpo-mpo", "reference": "dpo-mpo", "reward": "reward-1"}, {"split": {"subset": "hard"}}),
        "evaluate-mpo": ({"policy": "ppo-mpo"}, {}), "evaluate-sft": ({"policy": "sft-1"}, {}),
    }  # fmt: skip
    for name, (parents, settings) in lineage.items():
        path = made / "stages" / name / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest |= {"parents": parents, "settings": settings}
        if name.startswith(("dpo", "ppo")):
            manifest["summary"] = {{"dpo": "pairs", "ppo": "prompts"}[name[:3]]: 7, "steps": 5, "train": {"loss": 0.5}}
        path.write_text(json.dumps(manifest), encoding="utf-8")
        (made / "stages" / name / "model").mkdir(exist_ok=True)
    return made


def card(model: Path, folder: Path, **options: str) -> str:
    folder.mkdir()
    given = {"name": "exported", "kind": "language model", "dtype": "float32"} | options
    write_card(folder, model, str(model), **given)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_run_s_policy_has_its_whole_story(workdir: Path, tmp_path: Path) -> None:
    text = card(workdir / "runs" / "mpo" / "2-ppo" / "model", tmp_path / "out")
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and "ppo" in front["tags"] and "base_model" not in front
    for part in ("## Base model", "## How it was made", "## Data", "## Metrics", "## Configuration", "## Reproduce"):
        assert part in text
    assert "the final policy of the run `mpo`" in text
    lines = [line for line in text.splitlines() if line.startswith(("| sft-1", "| dpo-mpo", "| ppo-mpo"))]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["sft-1", "demonstrations", "", "10", ""],
        ["dpo-mpo", "easy pairs", "sft-1", "7", "5"],
        ["ppo-mpo", "hard prompts", "dpo-mpo", "7", "5"],
    ]
    # the evaluation's own numbers, and the toy data's source with what was dropped
    assert "| true utility" in text and "3.307" in text and "empty & void: 2" in text
    assert f"mpo ppo {CONFIG_FILE} experiment=mpo workdir=runs/again" in text
    assert "mpo export runs/again/runs/mpo DIR" in text and "made by: mpo run 'my config.yaml'" in text
    assert load_config(tmp_path / "out" / CONFIG_FILE).seed == 3


def test_a_stage_s_own_folder_leads_to_the_same_story(workdir: Path) -> None:
    by_run, by_stage = (find_origin(workdir / path) for path in ("runs/mpo/2-ppo/model", "stages/ppo-mpo/model"))
    assert by_run == by_stage and by_run is not None and by_run.run == "mpo"
    assert list(by_run.lineage) == ["sft-1", "dpo-mpo", "ppo-mpo"]


def test_a_step_in_the_middle_is_no_run_s_policy(workdir: Path, tmp_path: Path) -> None:
    text = card(workdir / "stages" / "dpo-mpo" / "model", tmp_path / "out")
    assert "what the stage dpo leaves" in text and "Not evaluated" in text
    assert f"mpo dpo {CONFIG_FILE} workdir=runs/again" in text


def test_a_reward_model_has_its_accuracy(workdir: Path, tmp_path: Path) -> None:
    text = card(workdir / "stages" / "reward-1" / "model", tmp_path / "out", kind="reward model")
    assert "Bradley-Terry" in text and "74.5%" in text and "86.3%" in text
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "text-classification"


def test_an_unfinished_stage_says_so(workdir: Path, tmp_path: Path) -> None:
    folder = workdir / "stages" / ".dpo-half.partial"
    (folder / "model").mkdir(parents=True)
    recipe = {"stage": "dpo", "settings": {"split": {"subset": "all"}}, "parents": {"init": "sft-1"}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "config.yaml").write_text((workdir / "runs/mpo/config.yaml").read_text())
    assert "had not finished" in card(folder / "model", tmp_path / "out")


def test_a_model_from_elsewhere_says_where_from(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    text = card(tmp_path / "given", tmp_path / "out")
    assert "It was not trained there" in text and str(tmp_path / "given") in text
    assert not (tmp_path / "out" / CONFIG_FILE).exists()
