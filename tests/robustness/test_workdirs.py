"""Every file of a workdir, damaged in every way: the commands that read it name it and say what to delete."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mpo_jax.config.load import load_config, to_yaml
from mpo_jax.data import toy
from mpo_jax.errors import UserError
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline import preflight
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.recipe import artifact_name
from mpo_jax.pipeline.run_folder import CONFIG, read_config
from mpo_jax.runtime.files import write_json, write_lines, write_text
from mpo_jax.tools import verify
from mpo_jax.tools.opening import find_model
from mpo_jax.tools.report.card import trained_config
from mpo_jax.tools.report.curves import stage_series
from mpo_jax.tools.verify import Stretch
from tests.cli.conftest import write_model
from tests.pipeline.test_pipeline import MICRO, mpo
from tests.tools.report import workdirs

RUN = "runs/mpo"
STAGES = ("sft", "reward", "select", "dpo", "ppo", "evaluate")
TRAINED = ("sft", "reward", "dpo", "ppo")
ROLES = ("sft", "reward", "select", "1-dpo", "2-ppo", "evaluate")

Damage = Callable[[Path, bytes], object]
"""Puts something else in the place of a file that was removed; gets its bytes."""

OF_BYTES: dict[str, Damage] = {
    "empty": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, whole: path.write_bytes(whole[: len(whole) * 2 // 3]),
    "garbage": lambda path, _: path.write_bytes(bytes(range(255, 0, -1))),
    "missing": lambda path, _: None,
    "a folder": lambda path, _: path.mkdir(),
    "a dangling link": lambda path, _: path.symlink_to("nowhere"),
}
OF_JSON: dict[str, Damage] = {
    "a list": lambda path, _: path.write_text("[]\n"),
    "another object": lambda path, _: path.write_text("{}\n"),
    "a number": lambda path, _: path.write_text("7\n"),
}
OF_A_LINK: dict[str, Damage] = {
    "missing": lambda path, _: None,
    "a dangling link": lambda path, _: path.symlink_to("../../stages/nowhere"),
    "a file": lambda path, _: path.write_text("x"),
}
ENTRIES: dict[str, dict] = {
    "no parents": {"parents": None},
    "parents of another type": {"parents": ["sft"]},
    "a summary of another type": {"summary": [1]},
    "seconds in words": {"seconds": "long"},
    "seconds without end": {"seconds": float("inf")},
    "an accuracy in words": {"summary": {"held_out_accuracy": "x"}},
    "bins in one number": {"summary": {"true_accuracy_by_gap": 10**30}},
    "bins without edges": {"summary": {"accuracy_by_gap": [{"count": 1}]}},
    "sources of another type": {"summary": {"data": "x"}},
    "warnings as text": {"warnings": "none"},
    "another stage": {"stage": "nothing"},
}
"""Single entries of a manifest."""

PLACES: dict[str, tuple[str, ...]] = {
    **{f"{stage}/manifest.json": ("plan", "report") for stage in STAGES},
    **{f"{stage}/metrics.jsonl": ("report", "verify") for stage in TRAINED},
    **{f"{stage}/config.yaml": ("verify",) for stage in TRAINED},
    "evaluate/samples.jsonl": ("report",),
    "select/pairs.parquet": ("report",),
    "reward/held_out.parquet": ("report",),
    f"{RUN}/config.yaml": ("report",),
    f"{RUN}/env.json": ("report",),
}
"""Every file that commands read, and which of them have to notice."""

CASES = [
    (place, damage)
    for place in PLACES
    for damage in (OF_BYTES if place.endswith(("parquet", "yaml")) else OF_BYTES | OF_JSON)
    # older reward models have no such file, and a missing configuration leaves a stage as it was before it began
    if (place, damage) != ("reward/held_out.parquet", "missing")
]


class Made:
    """A finished run of which nothing was trained, and the commands that read it."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.config = load_config(MICRO, (f"workdir={workdir}",))

    def make(self, model: Path) -> None:
        store = _Pretending(self.workdir, model)
        pipeline = Pipeline(self.config, store)
        pipeline.record(pipeline.experiment("mpo"))

    def place(self, name: str) -> Path:
        """`sft/manifest.json` in the workdir; of the finished stages one of each kind."""
        kind, _, rest = name.partition("/")
        if kind not in STAGES:
            return self.workdir / name
        (folder,) = self.workdir.glob(f"stages/{kind}-*")
        return folder / rest


class _Pretending(Store):
    """Writes what a stage leaves, without the work."""

    def __init__(self, workdir: Path, model: Path):
        super().__init__(workdir)
        self._trained = model

    def build(self, recipe, run):
        return super().build(recipe, lambda folder: self._write(recipe["stage"], folder))

    def _write(self, stage: str, folder: Path) -> Mapping:
        metrics = [{"step": step, "loss": 0.5, "state_hash": f"{step:032x}"} for step in (1, 2)]
        if stage in TRAINED:
            shutil.copytree(self._trained, folder / "model")
            write_lines(folder / "metrics.jsonl", metrics)
            write_text(folder / "config.yaml", [to_yaml(load_config(MICRO))])
            if stage == "reward":
                workdirs.write_gaps(folder, workdirs.np.ones(3), None)
            return {"steps": 2, "train": metrics[-1]}
        if stage == "select":
            workdirs.pairs(utility=True).write(folder)
            return {"pairs": 5}
        write_lines(folder / "samples.jsonl", workdirs.samples("mpo", ["a", "b"]))
        return {"prompts": 2, "score": 0.5, "score_se": 0.1}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    vocab = -(-len(toy.make_tokenizer()) // 8) * 8
    decoder = DecoderConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        max_positions=96, tie_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("made")
    made = Made(folder / "workdir")
    made.make(write_model(folder / "model", decoder))
    return made


@pytest.fixture
def copied(made, tmp_path) -> Made:
    """A copy whose unchanged files are the same files."""
    shutil.copytree(made.workdir, tmp_path / "copy", symlinks=True, copy_function=os.link)
    return Made(tmp_path / "copy")


@pytest.fixture(scope="module")
def pipeline(made) -> Pipeline:
    """Knows the data's fingerprint; its configuration's workdir is not read."""
    return Pipeline(made.config, _Pretending(made.workdir, made.workdir))


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch):
    """The report draws no figures, and verify trains nothing: what is tested is how they read."""

    def page(workdir, *, resamples, by_seed, evidence=None, price=None):
        for stage in TRAINED:
            stage_series(by_seed, stage)
        return workdir / "report" / "index.html"

    def same(workdir, folder, name, recipe, stretch, *, first):
        return bool(read_config(folder / CONFIG))

    def stretch(folder, sha256):
        recorded = verify._recorded(folder)
        return Stretch(1, 2, recorded[2], None) if 2 in recorded else None

    monkeypatch.setattr("mpo_jax.tools.report.page.write_report", page)
    monkeypatch.setattr(verify, "_same", same)
    monkeypatch.setattr(verify, "_stretch", stretch)


def read(command: str, made: Made, pipeline: Pipeline, capsys) -> tuple[int, str]:
    """The status and all that is said."""
    if command != "plan":
        status = mpo(command, made.workdir)
        captured = capsys.readouterr()
        return status, captured.out + captured.err
    try:
        store = preflight.Listing(made.workdir)
        listing = preflight.copy.copy(pipeline)
        listing.store = store
        listing.experiment("mpo")
    except UserError as error:
        return 2, str(error)
    return 0, ""


def replace(path: Path, damage: Damage) -> None:
    whole = b"" if path.is_dir() else path.read_bytes()
    path.unlink()
    damage(path, whole)


def test_the_undamaged_workdir_is_read(copied, pipeline, capsys):
    for command in ("report", "verify", "plan"):
        status, said = read(command, copied, pipeline, capsys)
        assert status == 0 and "is damaged" not in said and "caution" not in said
    assert find_model(str(copied.workdir / RUN)) == copied.workdir / RUN / "2-ppo" / "model"


@pytest.mark.parametrize("place,damage", CASES, ids=[f"{place}, {damage}" for place, damage in CASES])
def test_a_damaged_file_is_named_with_what_to_delete(copied, pipeline, capsys, place, damage):
    path = copied.place(place)
    replace(path, (OF_BYTES | OF_JSON)[damage])
    for command in ("report", "verify", "plan"):
        status, said = read(command, copied, pipeline, capsys)
        assert status in (0, 2), said
        assert "Traceback" not in said and "fault" not in said
        if command not in PLACES[place]:
            continue
        # the folder's own name: links lead to it
        assert f"{path.parent.name}/{path.name}" in said, command
        assert f"delete the folder {path.parent}" in said
        # curves, machine and command are all that a report can do without
        assert status == (0 if command == "report" and path.name in ("metrics.jsonl", "env.json") else 2)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("stage", ["sft", "evaluate"])
def test_a_wrong_entry_of_a_manifest(copied, pipeline, capsys, stage, entry):
    path = copied.place(f"{stage}/manifest.json")
    found = json.loads(path.read_text())
    replace(path, lambda path, _: path.write_text(json.dumps({**found, **ENTRIES[entry]})))
    status, said = read("plan", copied, pipeline, capsys)
    assert status == 2 and f"{path} " in said and f"delete the folder {path.parent}" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("has_eos", 17), ("prompts", -1), ("prompts", 1.5), ("score", math.nan), ("score", math.inf), ("score", True),
        ("score", 10**99), ("score_se", "x"), ("length", None),
    ],
)  # fmt: skip
def test_an_evaluation_s_impossible_value(copied, pipeline, capsys, name, value):
    path = copied.place("evaluate/manifest.json")
    found = json.loads(path.read_text())
    summary = {**found["summary"], "has_eos": 0.5, "has_eos_se": 0.1, name: value}
    replace(path, lambda path, _: path.write_text(json.dumps({**found, "summary": summary})))
    status, said = read("report", copied, pipeline, capsys)
    assert status == 2 and f"has no number that an evaluation has for {name} in its summary" in said


@pytest.mark.parametrize(
    ("place", "line", "says"),
    [
        ("evaluate/samples.jsonl", {"prompt": "p", "response": "r", "category": ["x"]}, "has no text for category"),
        ("dpo/metrics.jsonl", {"step": 9, "loss": "x"}, "has no number for loss in line 3"),
        ("ppo/metrics.jsonl", {"step": 9, "loss": None}, "has no number for loss in line 3"),
    ],
)
def test_a_wrong_value_of_a_line(copied, pipeline, capsys, place, line, says):
    path = copied.place(place)
    replace(path, lambda path, whole: path.write_bytes(whole + json.dumps(line).encode() + b"\n"))
    _, said = read("report", copied, pipeline, capsys)
    assert says in said and f"delete the folder {path.parent}" in said


@pytest.mark.parametrize("entry", [{"devices": 3}, {"devices": [1]}, {"command": "mpo run"}])
def test_a_wrong_entry_of_an_environment(copied, pipeline, capsys, entry):
    path = copied.place(f"{RUN}/env.json")
    found = json.loads(path.read_text())
    replace(path, lambda path, _: path.write_text(json.dumps({**found, **entry})))
    status, said = read("report", copied, pipeline, capsys)
    assert status == 0 and "env.json is damaged" in said


@pytest.mark.parametrize("damage", OF_A_LINK)
@pytest.mark.parametrize("role", ROLES)
def test_a_damaged_link_of_a_run(copied, pipeline, capsys, role, damage):
    folder = copied.workdir / RUN
    replace(folder / role, OF_A_LINK[damage])
    status, said = read("report", copied, pipeline, capsys)
    assert status == 2 and str(folder) in said and f"delete the folder {folder}" in said
    if role == "2-ppo" or damage == "a dangling link":
        with pytest.raises(UserError, match="delete the folder"):
            find_model(str(folder))
    else:
        # never the model of an earlier step
        assert find_model(str(folder)) == folder / "2-ppo" / "model"
    # the stages are whole: to link them again is all that a run has to do
    assert read("plan", copied, pipeline, capsys) == (0, "")


def test_a_report_goes_on_without_the_run_that_is_damaged(made, copied, capsys):
    """It says so once, among its cautions."""
    shutil.copytree(copied.workdir / RUN, copied.workdir / "runs" / "mpo_sft_kl", symlinks=True)
    (copied.workdir / RUN / "evaluate").unlink()
    assert mpo("report", copied.workdir) == 0
    said = capsys.readouterr().out
    assert said.count("the run mpo is left out") == 1 and "caution" in said


def test_something_in_a_stage_s_place_is_found_before_the_stage_is_made(copied, pipeline):
    """Found when the stage gets its name, all of its work would be lost."""
    recipe = json.loads(copied.place("ppo/manifest.json").read_text())
    recipe = {key: recipe[key] for key in ("format", "stage", "settings", "inputs", "parents")}
    store, folder = Store(copied.workdir), copied.place("ppo/")

    def never(partial):
        raise AssertionError("was made")

    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{folder.name}/manifest.json is missing: delete the folder"):
        store.build(recipe, never)
    shutil.rmtree(folder)
    folder.write_text("x")
    with pytest.raises(UserError, match=f"{folder.name} is no folder: delete it"):
        store.build(recipe, never)


@pytest.mark.parametrize("name", ["", "parts", "checkpoints"])
def test_a_file_in_place_of_an_unfinished_stage_s_folder_is_removed(tmp_path, capsys, name):
    recipe = {"format": 6, "stage": "sft", "settings": {}, "inputs": {}, "parents": {}}
    store = Store(tmp_path)
    partial = store.folder / f".{artifact_name(recipe)}.partial"
    if name:
        partial.mkdir()
    (partial / name).write_text("x")

    def run(folder):
        (folder / (name or "parts")).mkdir()
        return {}

    assert store.build(recipe, run).path.is_dir()
    assert "is no folder, and is removed" in " ".join(capsys.readouterr().out.split())


def test_an_unfinished_stage_has_no_model_yet(copied, capsys):
    """The hint says how to get one."""
    final = copied.place("ppo/")
    partial = final.with_name(f".{final.name}.partial")
    shutil.copytree(final, partial)
    recipe = json.loads((partial / "manifest.json").read_text())
    (partial / "manifest.json").unlink()
    (partial / "model" / "model.safetensors").unlink()
    write_json(partial / "recipe.json", recipe)
    assert mpo("generate", str(partial), "hello") == 2
    assert "the stage is not finished" in (said := capsys.readouterr().err) and "mpo export" in said
    shutil.rmtree(partial / "model")
    assert mpo("generate", str(partial), "hello") == 2
    assert "the stage is not finished" in capsys.readouterr().err


def test_a_damaged_manifest_or_configuration_of_a_model_that_is_opened(copied):
    """Its template and lengths would be those of a model from elsewhere."""
    model = copied.place("ppo/model")
    assert trained_config(model) is not None
    replace(copied.place("ppo/manifest.json"), OF_BYTES["truncated"])
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*: delete the folder"):
        trained_config(model)


@pytest.mark.parametrize("damage", OF_BYTES)
def test_the_report_s_own_record_is_written_again(copied, capsys, damage):
    """What `mpo run` compares with to see whether the report is of the same runs."""
    record = copied.workdir / "report" / "inputs.json"
    assert mpo("run", MICRO, f"workdir={copied.workdir}") == 0
    replace(record, OF_BYTES[damage])
    assert mpo("run", MICRO, f"workdir={copied.workdir}") == (2 if damage == "a folder" else 0), capsys.readouterr()
