"""Saved types, critics and `runtime.keep=last`: what stays on disk, and what is made again when it is needed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.pipeline import keeping
from mpo_jax.pipeline.bucket import Bucket
from mpo_jax.pipeline.keeping import ModelStore, Plan, is_removed, remove_models
from mpo_jax.pipeline.recipe import artifact_name
from mpo_jax.runtime.console import console
from mpo_jax.tools.opening import find_model
from mpo_jax.types import REMOVED, Artifact
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.thorough

# a chain of made-up stages: a policy, one trained from it, one from that, and the evaluation of the last


def recipe_of(stage: str, **parents: str) -> dict[str, Any]:
    return {"format": 0, "stage": stage, "settings": {}, "inputs": {}, "parents": parents}


SFT = recipe_of("sft")
REWARD = recipe_of("reward", sft=artifact_name(SFT))
DPO = recipe_of("dpo", init=artifact_name(SFT))
PPO = recipe_of("ppo", init=artifact_name(DPO), reference=artifact_name(SFT), reward=artifact_name(REWARD))
EVALUATE = recipe_of(
    "evaluate", policy=artifact_name(PPO), sft=artifact_name(SFT), reward=artifact_name(REWARD)
)  # fmt: skip
CHAIN = {artifact_name(recipe): recipe for recipe in (SFT, REWARD, DPO, PPO, EVALUATE)}
NAMES = {recipe["stage"]: name for name, recipe in CHAIN.items()}


class Chain:
    """Makes the chain in a workdir and records in which order stages ran; each reads its parents' models."""

    def __init__(self, workdir: Path, *, keep: str = "last", bucket: str | None = None):
        runtime = {"keep": keep, "bucket": bucket}
        self.store = ModelStore(Config.model_validate({"workdir": str(workdir), "runtime": runtime}))
        self.store.plan = Plan.of(CHAIN)
        self.ran: list[str] = []

    def build(self, *kinds: str) -> dict[str, Artifact]:
        return {kind: self.store.build(CHAIN[NAMES[kind]], self._maker(kind)) for kind in kinds or NAMES}

    def _maker(self, kind: str) -> Any:
        def run(folder: Path) -> dict[str, Any]:
            for parent in CHAIN[NAMES[kind]]["parents"].values():
                assert (self.store.folder / parent / "model" / "weights").read_text() == parent
            self.ran.append(kind)
            if kind != "evaluate":
                for part in ("model", "critic") if kind == "ppo" else ("model",):
                    (folder / part).mkdir(exist_ok=True)
                    (folder / part / "weights").write_text(NAMES[kind])
            return {}

        return run

    def models(self) -> set[str]:
        return {path.parent.name.partition("-")[0] for path in self.store.folder.glob("*/model")}


def test_models_go_once_nothing_reads_them(tmp_path):
    chain = Chain(tmp_path)
    chain.build("sft", "reward", "dpo")
    assert chain.models() == {"sft", "reward", "dpo"}  # PPO and the evaluation still read SFT
    chain.build("ppo")
    assert chain.models() == {"sft", "reward", "ppo"}
    made = chain.build("evaluate")["evaluate"]
    assert chain.models() == {"reward", "ppo"} and made.manifest["stage"] == "evaluate"
    assert (chain.store.folder / NAMES["ppo"] / "critic").is_dir()
    manifest = json.loads((chain.store.folder / NAMES["dpo"] / "manifest.json").read_text())
    assert manifest[REMOVED] == ["model"] and manifest["parents"] == DPO["parents"]
    again = Chain(tmp_path)
    again.build()
    assert again.ran == [] and again.models() == {"reward", "ppo"}


def test_models_that_later_seeds_take_stay_until_the_last(tmp_path):
    chain = Chain(tmp_path)
    chain.store._later = {NAMES["sft"]}
    chain.build()
    chain.store.finish()
    assert chain.models() == {"sft", "reward", "ppo"}
    chain.store.release()
    assert chain.models() == {"reward", "ppo"}


def test_all_models_are_kept_unless_asked(tmp_path):
    chain = Chain(tmp_path, keep="all")
    chain.build()
    chain.store.finish()
    assert chain.models() == {"sft", "reward", "dpo", "ppo"}


def test_what_a_left_out_run_would_have_read_goes_at_the_end(tmp_path):
    chain = Chain(tmp_path)
    chain.build("sft", "reward", "dpo")
    chain.store.finish()
    assert chain.models() == {"reward"}


def test_a_removed_model_is_made_again_for_the_stage_that_needs_it(tmp_path):
    """With its own parents' models, which were removed too, and those go again afterwards."""
    Chain(tmp_path).build()
    for kind in ("ppo", "evaluate"):
        shutil.rmtree(tmp_path / "stages" / NAMES[kind])
    chain = Chain(tmp_path)
    with console.capture() as captured:
        chain.build()
    assert chain.ran == ["sft", "dpo", "ppo", "evaluate"] and chain.models() == {"reward", "ppo"}
    lines = [line for line in captured.get().splitlines() if "is made again" in line]
    assert len(lines) == 2 and NAMES["dpo"] in lines[0] and f"{NAMES['ppo']} needs it" in lines[0]
    assert len(chain.store.made) == 4 and not set(chain.store.made) & set(chain.store.reused)


def test_the_result_asked_for_has_its_model(tmp_path):
    Chain(tmp_path).build()
    chain = Chain(tmp_path, keep="all")
    chain.store.plan = None
    assert is_removed(chain.build("sft")["sft"].path)
    restored = chain.store.restored(chain.build("sft", "reward", "dpo")["dpo"])
    assert (restored.model / "weights").is_file() and REMOVED not in restored.manifest
    assert chain.ran == ["sft", "dpo"]


def test_a_kill_while_removing_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    chain = Chain(tmp_path, keep="all")
    folder = chain.build("sft")["sft"].path

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keeping.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_models(folder)
    assert (folder / "model" / "weights").is_file() and is_removed(folder)
    again = Chain(tmp_path)
    again.build("sft", "reward")
    assert again.ran == ["sft", "reward"] and not is_removed(folder)


def test_removed_models_come_from_the_bucket(tmp_path):
    """Where they stay; only what was sent without its model is made again."""
    url = f"file://{tmp_path}/bucket"
    Chain(tmp_path / "a", bucket=url).build()
    assert Chain(tmp_path / "a", bucket=url).models() == {"reward", "ppo"}
    assert Bucket(url).has(f"stages/{NAMES['dpo']}/model/weights")
    for place in (tmp_path / "a", tmp_path / "bucket"):
        shutil.rmtree(place / "stages" / NAMES["ppo"])
    chain = Chain(tmp_path / "a", bucket=url)
    chain.build()
    assert chain.ran == ["ppo"] and chain.models() == {"reward", "ppo"}
    Chain(tmp_path / "b").build()
    other = f"file://{tmp_path}/other"
    Chain(tmp_path / "b", bucket=other).build()
    assert not Bucket(other).has(f"stages/{NAMES['sft']}/model/weights")
    last = Chain(tmp_path / "c", bucket=other, keep="all")
    last.build()
    assert last.ran == []
    assert (last.store.restored(last.build("sft")["sft"]).model / "weights").is_file() and last.ran == ["sft"]


# the stages themselves


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[Path, str]:
    """A micro table in bfloat16, without critics, that keeps what it ends with; and what was printed."""
    workdir = tmp_path_factory.mktemp("keep")
    with console.capture() as captured:
        assert make(workdir, "experiment=ppo,mpo") == 0
    return workdir, captured.get()


def make(workdir: Path, *more: str) -> int:
    options = (
        "seeds=0",
        "table.thresholds=[]",
        "runtime.save_dtype=bfloat16",
        "ppo.save_critic=false",
        "runtime.keep=last",
    )
    return mpo("table", str(MICRO), f"workdir={workdir}", *options, *more)


def dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118


def of_run(workdir: Path, run: str, role: str) -> Path:
    return (workdir / "seed-0" / "runs" / run / role).resolve()


def test_a_table_keeps_final_policies_and_the_reward_model(table):
    workdir, _ = table
    kept = {path.parent.name for path in (workdir / "seed-0" / "stages").glob("*/model")}
    assert kept == {of_run(workdir, *last).name for last in (("ppo", "1-ppo"), ("mpo", "2-ppo"), ("mpo", "reward"))}
    assert "parameters trained from scratch" in (workdir / "report" / "index.html").read_text()
    assert not list(workdir.rglob("critic"))
    with console.capture() as captured:
        assert make(workdir, "experiment=ppo,mpo") == 0
    assert "0 stages made" in captured.get() and "is made again" not in captured.get()


def test_models_are_saved_in_the_type_asked_for(table, tmp_path):
    workdir, _ = table
    policy, reward = (of_run(workdir, "mpo", role) / "model" for role in ("2-ppo", "reward"))
    assert dtypes(policy) == dtypes(reward) == {"bfloat16"}
    assert json.loads((policy / "config.json").read_text())["dtype"] == "bfloat16"
    # actor and reference both start from the rounded weights
    first = json.loads((policy.parent / "metrics.jsonl").read_text().splitlines()[0])
    assert first["objective/kl"] == 0
    for source, name in ((policy, "a"), (tmp_path / "a", "b")):
        assert mpo("export", str(source), str(tmp_path / name), "--dtype", "bfloat16") == 0
    for name in ("a", "b"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (policy / "model.safetensors").read_bytes()


def test_folders_without_model_or_critic_say_why(table):
    workdir, _ = table
    with pytest.raises(UserError, match=r"was removed .* \(runtime.keep=last\): mpo dpo CONFIG makes it again"):
        find_model(str(of_run(workdir, "mpo", "1-dpo")))
    for path in (of_run(workdir, "mpo", "2-ppo"), workdir / "seed-0" / "runs" / "mpo"):
        with pytest.raises(UserError, match=r"ppo.save_critic=false"):
            find_model(str(path), critic=True)


def test_a_later_run_makes_the_removed_model_again(table, tmp_path):
    """The same one: `sft` as a run of its own needs it for its evaluation, and keeps it."""
    workdir = Path(shutil.copytree(table[0], tmp_path / "copy", symlinks=True))
    before = (of_run(workdir, "mpo", "sft") / "metrics.jsonl").read_text().splitlines()
    with console.capture() as captured:
        assert make(workdir, "experiment=sft,ppo,mpo", "--dry-run") == 0
    assert "to make" in next(line for line in captured.get().splitlines() if " sft-" in line)
    with console.capture() as captured:
        assert make(workdir, "experiment=sft,ppo,mpo") == 0
    assert captured.get().count("is made again") == 1
    after = of_run(workdir, "mpo", "sft")
    assert dtypes(after / "model") == {"bfloat16"}
    hashes = [
        [json.loads(line)["state_hash"] for line in lines if "state_hash" in line]
        for lines in (before, (after / "metrics.jsonl").read_text().splitlines())
    ]
    assert hashes[0] == hashes[1] != []
