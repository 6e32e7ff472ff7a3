"""`mpo sft`, `dpo` and the others: without a YAML file, by short flags, and without stages that they do not need."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpo_jax.cli.arguments import read_config, read_run, short_keys
from mpo_jax.config.schema import ToyConfig
from mpo_jax.data import toy
from mpo_jax.errors import UserError
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.tools import runs
from mpo_jax.tools.opening import find_model
from mpo_jax.types import Artifact
from tests.pipeline.test_pipeline import MICRO, mpo, stages

SMALL = (
    "experiment=dpo_base", "train.steps=2", "train.batch_size=4", "text.max_prompt_tokens=40",
    "text.max_response_tokens=16", "text.length_buckets=1", "runtime.compilation_cache=null",
    "runtime.token_cache=null", "runtime.fingerprint_cache=null", "runtime.tensorboard=false",
)  # fmt: skip


@pytest.fixture
def pairs(tmp_path) -> Path:
    world = ToyConfig(num_pairs=24, num_attempts=1, num_fillers=0)
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
        for row in toy.preferences(world, test=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kinds(workdir: Path) -> list[str]:
    return sorted(name.rpartition("-")[0] for name in stages(workdir))


def test_demonstrations_alone_are_enough_for_sft(language_model, pairs, tmp_path, capsys):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    shown = tmp_path / "sft.jsonl"
    shown.write_text("".join(json.dumps({"prompt": r["prompt"], "response": r["chosen"]}) + "\n" for r in rows))
    flags = ("--model", language_model, f"data.sft_path={shown}", "--out", tmp_path / "work", *SMALL[3:])
    flags = (*flags, "data.validation_fraction=0")
    assert mpo("sft", *flags, "train.steps=2", "train.batch_size=4") == 0
    assert f"{len(rows)} demonstrations" in capsys.readouterr().out
    assert mpo("dpo", *flags) == 2
    assert "mpo dpo needs pairs: name their files, data.path" in capsys.readouterr().err
    shown.write_text(
        json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}) + "\n"
    )
    assert mpo("data", "--model", language_model, "--data", shown) == 2
    assert "sft.jsonl:1: the row is a demonstration, {conversations}" in (said := capsys.readouterr().err)
    assert "name its file in data.sft_path" in said


def test_a_run_up_to_its_reward_model_is_no_policy(language_model, pairs, tmp_path, capsys):
    flags = ("--model", language_model, "--data", pairs, "--out", tmp_path / "work", "sft.skip=true", *SMALL[1:])
    assert mpo("reward", *flags, "data.validation_fraction=0.3") == 0
    run = tmp_path / "work" / "runs" / "mpo"
    for name in (tmp_path / "work", run):
        assert mpo("score", name, pairs, "--out", tmp_path / "out.jsonl") == 2
        said = capsys.readouterr().err
        assert f"{name} was made up to its reward model: name {run / 'reward'} for that, or {run / 'sft'} for" in said
    assert mpo("score", run / "reward", pairs, "--out", tmp_path / "out.jsonl", *SMALL[-4:-1]) == 0
    assert "scored by the reward model" in capsys.readouterr().out


@pytest.mark.thorough
def test_dpo_on_a_model_and_pairs_is_one_line_and_makes_nothing_else(language_model, pairs, tmp_path, capsys):
    workdir = tmp_path / "work"
    flags = ("--model", language_model, "--data", pairs, "--out", workdir)
    assert mpo("dpo", *flags, "sft.skip=true", *SMALL) == 0
    assert kinds(workdir) == ["dpo", "sft"]
    run = workdir / "runs" / "dpo_base"
    assert sorted(link.name for link in run.iterdir() if link.is_symlink()) == ["1-dpo", "sft"]
    base, first = (load_file(folder / "model.safetensors") for folder in (language_model, run / "sft" / "model"))
    assert base.keys() == first.keys() and all(np.array_equal(base[name], first[name]) for name in base)
    parents = json.loads((run / "1-dpo" / "manifest.json").read_text())["parents"]
    assert parents == {role: (run / "sft").resolve().name for role in ("init", "reference")}

    assert mpo("export", workdir, tmp_path / "exported") == 0
    trained = load_file(run / "1-dpo" / "model" / "model.safetensors")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(np.array_equal(trained[name], exported[name]) for name in trained)
    assert mpo("generate", workdir, "my boss", "--max-new-tokens", "3", *SMALL[-4:]) == 0
    capsys.readouterr()
    assert mpo("report", workdir) == 0
    said = capsys.readouterr().out
    assert f"dpo_base has no evaluation; mpo evaluate {run / 'config.yaml'} makes it:" in said
    lines = said.splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["sft", "1-dpo", "report"]
    assert "rewards/margins" in lines[1] and (workdir / "report" / "index.html").is_file()


def test_a_workdir_names_its_policy_unless_its_runs_have_several(language_model, tmp_path, capsys):
    for stage in ("sft-a", "dpo-a"):
        shutil.copytree(language_model, tmp_path / "stages" / stage / "model")
    for run, links in {"mpo": {"sft": "sft-a"}, "mpo_sft_kl": {"sft": "sft-a"}}.items():
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "env.json").write_text(json.dumps({"stages": ["sft"]}))
        for role, stage in links.items():
            (tmp_path / "runs" / run / role).symlink_to(tmp_path / "stages" / stage)
    assert find_model(str(tmp_path)).resolve() == (tmp_path / "stages" / "sft-a" / "model").resolve()
    (tmp_path / "runs" / "mpo" / "1-dpo").symlink_to(tmp_path / "stages" / "dpo-a")
    (tmp_path / "runs" / "mpo" / "env.json").write_text(json.dumps({"stages": ["sft", "1-dpo"]}))
    with pytest.raises(UserError, match=r"holds several runs: name one of .*runs/mpo, .*runs/mpo_sft_kl"):
        find_model(str(tmp_path))


def test_a_workdir_stopped_half_way_names_what_is_there(tmp_path):
    (tmp_path / "stages" / "sft-a" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no finished run: the same command goes on .* stages: .*stages/sft-a$"):
        find_model(str(tmp_path))
    assert mpo("verify", tmp_path / "nothing") == 2


def test_keys_of_training_leave_the_name_of_a_skipped_sft(language_model):
    from mpo_jax.config.base import recipe_values
    from mpo_jax.stages.sft import Settings

    skipped = read_config(f"model.path={language_model}", ["sft.skip=true"])
    other = read_config(f"model.path={language_model}", ["sft.skip=true", "sft.train.steps=7", "model.adapter={}"])
    assert Settings.of(skipped) == Settings.of(other)
    assert recipe_values(Settings.of(skipped))["skip"] is True
    assert "skip" not in recipe_values(Settings.of(read_config(None, [])))


def test_skipping_sft_needs_a_model(capsys, tmp_path):
    assert mpo("dpo", MICRO, "sft.skip=true", f"workdir={tmp_path}") == 2
    assert "sft.skip=true needs model.path" in capsys.readouterr().err


def test_neither_file_nor_key_is_a_mistake(capsys):
    for command in ("run", "table", "sft", "evaluate"):
        assert mpo(command) == 2
        assert f"mpo {command} needs CONFIG, a YAML file" in capsys.readouterr().err


def test_without_a_file_a_training_command_means_its_own_algorithm():
    data = "data.path=[a.jsonl]"
    for command, experiment in {"sft": "sft", "dpo": "dpo_base", "ppo": "ppo", "select": "mpo"}.items():
        assert read_run(command, None, [data])[1].experiment == (experiment,)
        assert read_run(command, None, [data, "experiment=mpo_sft_kl"])[1].experiment == ("mpo_sft_kl",)
        assert read_run(command, MICRO, [])[1].experiment == read_config(MICRO, []).experiment


def test_short_flags_are_keys_and_read_as_text(tmp_path):
    config = read_config(MICRO, short_keys("a: [b]", ["1.jsonl", "2.jsonl"], "2024"))
    assert (config.model.path, config.data.path, config.workdir) == ("a: [b]", ("1.jsonl", "2.jsonl"), "2024")
    assert config.data.kind == "pairs"
    file = tmp_path / "a=b.yaml"
    file.write_text("seed: 3")
    assert read_config(file, []).seed == 3


def test_each_path_is_printed_once_and_after_training_where_the_curves_are(monkeypatch, capsys, tmp_path):
    made = [("mpo", "a"), ("mpo_sft_kl", "a"), ("dpo_base", "b")]
    monkeypatch.setattr(runs, "start", lambda config: None)
    monkeypatch.setattr(runs, "run_until", lambda *_: ((name, Artifact(Path(path), {})) for name, path in made))
    assert mpo("sft", MICRO, f"workdir={tmp_path}") == 0
    lines, curves = ["mpo, mpo_sft_kl: a", "dpo_base: b"], f"tensorboard --logdir {tmp_path}"
    assert capsys.readouterr().out.splitlines()[1:] == [*lines, curves]
    for command, more in (("sft", ["runtime.tensorboard=false"]), ("evaluate", [])):
        assert mpo(command, MICRO, f"workdir={tmp_path}", *more) == 0
        assert capsys.readouterr().out.splitlines()[1:] == lines


def test_a_stop_names_the_workdir_once_it_is_known(monkeypatch, tmp_path):
    said: list[str] = []
    monkeypatch.setattr(runs, "start", lambda config: said.append(STOPS.message()))
    monkeypatch.setattr(runs, "run_until", lambda *_: ())
    on = "terminated: the same command goes on from the stages that are finished"
    assert mpo("sft", MICRO, f"workdir={tmp_path}") == 0
    assert said.pop() == f"{on} in {tmp_path}"
    monkeypatch.setattr("mpo_jax.cli.stages.read_run", lambda *_, **__: said.append(STOPS.message()) or sys.exit(0))
    assert mpo("sft", MICRO, f"workdir={tmp_path}") == 0
    assert said == [on]
