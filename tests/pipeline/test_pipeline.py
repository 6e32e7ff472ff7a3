"""The real command line on the micro configuration: stages, reuse, variants, devices, kills, and mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mpo_jax.cli import app
from mpo_jax.data.pair_table import PairTable
from mpo_jax.models.hf import families
from tests.wandb_records import written

MICRO = Path(__file__).parents[1] / "configs" / "micro.yaml"


def mpo(*arguments: str) -> int:
    """Runs the command line in this process; returns its exit status."""
    previous, sys.argv = sys.argv, ["mpo", *map(str, arguments)]
    try:
        app.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = previous
    return 0


def stages(workdir: Path) -> dict[str, float]:
    """Finished stages and when each was finished."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (workdir / "stages").glob("*/manifest.json")}


def manifest_folder(workdir: Path, run: str, role: str) -> Path:
    """The artifact folder that a run's link leads to."""
    return (workdir / "runs" / run / role).resolve()


def manifest(workdir: Path, run: str, role: str) -> dict:
    return json.loads((workdir / "runs" / run / role / "manifest.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A workdir with a finished MPO run."""
    workdir = tmp_path_factory.mktemp("micro")
    assert mpo("run", MICRO, f"workdir={workdir}") == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


def test_a_run_leaves_every_artifact(finished):
    kinds = sorted(name.rsplit("-", 1)[0] for name in stages(finished))
    assert kinds == ["dpo", "evaluate", "ppo", "reward", "select", "sft"]
    run = finished / "runs" / "mpo"
    assert (run / "config.yaml").is_file() and json.loads((run / "env.json").read_text())["packages"]["jax"]
    for role in ("sft", "reward", "1-dpo", "2-ppo"):
        assert (run / role / "model" / "model.safetensors").is_file()
        assert families.read_config(run / role / "model").num_layers == 2
        lines = (run / role / "metrics.jsonl").read_text().splitlines()
        numbers = [[value for value in json.loads(line).values() if not isinstance(value, str)] for line in lines]
        assert lines and all(np.isfinite(values).all() for values in numbers)
        assert list((run / role / "tensorboard").iterdir())
        assert not (run / role / "checkpoints").exists()
    assert "<html" in (finished / "report" / "index.html").read_text()
    assert not list((finished / "stages").glob(".*.partial"))


def test_ppo_metrics_have_the_field_s_names(finished):
    names = set(json.loads((finished / "runs/mpo/2-ppo/metrics.jsonl").read_text().splitlines()[-1]))
    assert names >= {
        "objective/kl", "objective/entropy", "objective/scores", "objective/non_score_reward", "objective/rlhf_reward",
        "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/ratio",
        "val/clipfrac_avg", "val/num_eos_tokens", "critic/explained_variance", "response_length/mean",
        "response_length/clip_ratio", "timing_s/rollout", "timing_s/step", "perf/tokens_per_s",
    }  # fmt: skip


def test_step_0_identities_in_a_real_run(finished):
    """DPO starts at log 2; MPO's PPO starts with KL 0 and ratio 1, since its reference is where it starts."""
    first = lambda role: json.loads((finished / f"runs/mpo/{role}/metrics.jsonl").read_text().splitlines()[0])  # noqa: E731
    # reference log-probs come from another compiled program than the step's
    np.testing.assert_allclose(first("1-dpo")["loss"], np.log(2), rtol=1e-6)
    assert first("2-ppo")["objective/kl"] == 0 and first("2-ppo")["objective/kl_k3"] == 0
    np.testing.assert_allclose(first("2-ppo")["val/ratio"], 1.0, rtol=1e-6)


def test_selection_keeps_every_pair_and_splits_by_filter(finished):
    table = PairTable.read(finished / "runs/mpo/select")
    summary = manifest(finished, "mpo", "select")["summary"]
    assert len(table) == summary["pairs"] == 47 > len(set(table.prompt))  # a row a pair, though posts recur
    assert len({tuple(ids) for pair in table.ids for ids in pair}) > 90  # each visit draws samples of its own
    np.testing.assert_allclose(table.gap, np.abs(table.score[:, 0] - table.score[:, 1]), rtol=1e-6)
    rows = np.arange(len(table))
    assert (table.score[rows, table.chosen] >= table.score[rows, 1 - table.chosen]).all()
    for size in summary["sizes"]:
        assert size["easy"] + size["hard"] == len(table)
    easy = manifest(finished, "mpo", "1-dpo")["summary"]["pairs"]
    hard = manifest(finished, "mpo", "2-ppo")["summary"]["prompts"]
    assert easy + hard == len(table) and abs(easy - len(table) / 2) <= 1


def test_what_a_result_does_not_mean_is_in_the_manifests(finished):
    """Few updates in every stage that trains; a reward model of four updates that is no better than a coin."""
    for role, stage in (("sft", "sft"), ("reward", "reward"), ("1-dpo", "dpo"), ("2-ppo", "ppo")):
        assert any(f"{stage} makes" in warning for warning in manifest(finished, "mpo", role)["warnings"])
    reward = manifest(finished, "mpo", "reward")
    low, high = reward["summary"]["held_out_accuracy_interval"]
    assert low <= 0.5 <= high
    assert any("does not beat chance" in warning for warning in reward["warnings"])
    assert manifest(finished, "mpo", "select")["warnings"] == manifest(finished, "mpo", "evaluate")["warnings"] == []


def test_a_second_run_does_nothing_and_says_so(finished, capsys):
    before, page = stages(finished), finished / "report" / "index.html"
    written = page.stat().st_mtime_ns
    begin = time.perf_counter()
    assert mpo("run", MICRO, f"workdir={finished}") == 0
    assert time.perf_counter() - begin < 10
    assert stages(finished) == before and page.stat().st_mtime_ns == written
    assert "nothing was computed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.thorough
def test_wandb_redoes_nothing_and_gets_the_report(copied, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(copied / "home"))
    before = stages(copied)
    assert mpo("run", MICRO, f"workdir={copied}", "runtime.wandb.mode=offline") == 0
    assert stages(copied) == before
    (run,) = written(copied)
    (artifact,) = run.artifacts
    assert (run.run.job_type, artifact.type) == ("report", "report")
    assert {"report/index.html", "report/tables/main.csv"} < {entry.path for entry in artifact.manifest.contents}
    assert run.config["runtime"]["wandb"]["mode"] == "offline" and np.isfinite(run.summary["mpo/score"])


@pytest.mark.thorough
def test_a_changed_key_redoes_what_depends_on_it(copied):
    before = set(stages(copied))
    assert mpo("run", MICRO, f"workdir={copied}", "dpo.beta=0.2") == 0
    made = sorted(name.rsplit("-", 1)[0] for name in set(stages(copied)) - before)
    assert made == ["dpo", "evaluate", "ppo"]


@pytest.mark.thorough
def test_bookkeeping_keys_redo_nothing(copied):
    before, page = stages(copied), copied / "report" / "index.html"
    shown = page.read_text()
    keys = ("dpo.train.log_every=7", "sft.train.checkpoint_every=9", "evaluate.num_samples_shown=1")
    assert mpo("run", MICRO, f"workdir={copied}", *keys) == 0
    assert stages(copied) == before
    assert page.read_text() != shown, "the report must show what the changed keys ask for"


@pytest.mark.thorough
def test_variants_share_sft_reward_and_selection(copied):
    """Every experiment runs, and mpo_sft_kl alone starts PPO away from its reference."""
    before = set(stages(copied))
    names = "sft,dpo_base,dpo,ppo,mpo,mpo_sft_kl,mpo_reverse,mpo_reverse_sft"
    assert mpo("run", MICRO, f"workdir={copied}", f"experiment={names}") == 0
    made = [name.rsplit("-", 1)[0] for name in set(stages(copied)) - before]
    assert not {"sft", "reward", "select"} & set(made)
    assert made.count("evaluate") == 7
    # dpo_base, dpo, and mpo_reverse's and mpo_reverse_sft's; ppo, mpo_sft_kl's, and one that both reverses share
    assert (made.count("dpo"), made.count("ppo")) == (4, 3)
    first = lambda run, role: json.loads((copied / f"runs/{run}/{role}/metrics.jsonl").read_text().splitlines()[0])  # noqa: E731
    assert first("mpo_sft_kl", "2-ppo")["objective/kl"] != 0 and first("ppo", "1-ppo")["objective/kl"] == 0
    parents = manifest(copied, "mpo_reverse_sft", "2-dpo")["parents"]
    assert parents["reference"] == manifest(copied, "mpo", "1-dpo")["parents"]["init"] != parents["init"]


@pytest.mark.thorough
def test_a_finished_reward_model_takes_the_trained_one_s_place(finished, copied, capsys):
    """`reward.path`: nothing is trained, and selection and PPO get the very same scores."""
    given = (finished / "runs" / "mpo" / "reward" / "model").resolve()
    assert mpo("run", MICRO, f"workdir={copied}", f"reward.path={given}") == 0
    summary = manifest(copied, "mpo", "reward")["summary"]
    trained = manifest(finished, "mpo", "reward")["summary"]
    assert "steps" not in summary and summary["path"] == str(given)
    for key in ("held_out_accuracy", "accuracy_by_gap", "data"):
        assert summary[key] == trained[key]
    assert manifest_folder(copied, "mpo", "sft").name == manifest_folder(finished, "mpo", "sft").name
    before, after = (PairTable.read(folder / "runs" / "mpo" / "select") for folder in (finished, copied))
    np.testing.assert_array_equal(before.score, after.score)
    assert manifest(copied, "mpo", "evaluate")["summary"] == manifest(finished, "mpo", "evaluate")["summary"]
    capsys.readouterr()
    policy = given.parents[1] / manifest_folder(finished, "mpo", "sft").name / "model"
    assert mpo("reward", MICRO, f"workdir={copied}", f"reward.path={policy}") == 2
    assert "is not a reward model: it has no tensor score.weight" in capsys.readouterr().err


@pytest.mark.thorough
def test_frozen_models_stay_as_they_were(copied):
    """PPO's reference and reward model on disk, and what they compute, are untouched by the training that used them."""
    digest = lambda role: (copied / f"runs/mpo/{role}/model/model.safetensors").read_bytes()  # noqa: E731
    before = {role: digest(role) for role in ("sft", "reward", "1-dpo")}
    assert mpo("ppo", MICRO, f"workdir={copied}", "ppo.kl.coef=0.3") == 0
    assert {role: digest(role) for role in before} == before
    assert before["1-dpo"] != digest("2-ppo")


@pytest.mark.thorough
def test_eight_devices_give_one_device_s_metrics(finished, tmp_path):
    """All stages on a mesh of eight simulated devices: every logged number agrees to rounding."""
    assert mpo("run", MICRO, f"workdir={tmp_path}", "mesh.fsdp=8", "runtime.cpu_devices=8") == 0
    assert set(stages(tmp_path)) == set(stages(finished)), "the mesh must not enter an artifact's name"
    for role in ("sft", "reward", "1-dpo", "2-ppo"):
        one, eight = (
            [json.loads(line) for line in (folder / f"runs/mpo/{role}/metrics.jsonl").read_text().splitlines()]
            for folder in (finished, tmp_path)
        )
        for a, b in zip(one, eight, strict=True):
            for name in a:
                # before DPO's first update every implicit reward is 0, and which is greater is rounding
                undecided = name == "rewards/accuracies" and a["step"] == 1
                # hashes of states that differ in rounding are different
                if not name.startswith(("timing_s", "perf", "state_hash")) and not undecided:
                    np.testing.assert_allclose(b[name], a[name], rtol=2e-3, atol=2e-4, err_msg=f"{role} {name}")
    a, b = (PairTable.read(folder / "runs/mpo/select") for folder in (finished, tmp_path))
    ids, others = ([[side.tolist() for side in pair] for pair in table.ids] for table in (a, b))
    assert ids == others
    np.testing.assert_allclose(b.score, a.score, rtol=1e-3, atol=1e-4)


def test_killed_in_mid_stage_goes_on_and_ends_equal(finished, tmp_path):
    """kill -9 while a real process trains: no finished folder, and the rerun's SFT equals the uninterrupted one."""
    command = [
        sys.executable,
        "-c",
        "from mpo_jax.cli.app import main; main()",
        "sft",
        str(MICRO),
        f"workdir={tmp_path}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.time() + 120
    while time.time() < deadline and not list(tmp_path.glob("stages/.sft-*.partial/metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not stages(tmp_path) and list(tmp_path.glob("stages/.sft-*.partial"))
    assert mpo("sft", MICRO, f"workdir={tmp_path}") == 0
    name = next(iter(stages(tmp_path)))
    model = lambda folder: (folder / "stages" / name / "model" / "model.safetensors").read_bytes()  # noqa: E731
    assert model(tmp_path) == model(finished)


@pytest.mark.thorough
def test_ppo_interrupted_in_mid_stage_goes_on_and_ends_equal(finished, copied, monkeypatch, capsys):
    """Actor, critic, moments and KL coefficient all come back: the resumed stage's models equal the first run's."""
    from mpo_jax.stages import ppo

    name = manifest_folder(copied, "mpo", "2-ppo").name
    shutil.rmtree(copied / "stages" / name)
    iteration = ppo.Loop.iteration

    def interrupted(self, state, batch, *rest):
        if batch.number == 2:
            raise KeyboardInterrupt
        return iteration(self, state, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ppo.Loop, "iteration", interrupted)
        assert mpo("run", MICRO, f"workdir={copied}") == 130
    said = f"interrupted in {name} of {copied}: step 2 is saved; the same command goes on from there"
    assert said in capsys.readouterr().err
    assert name not in stages(copied)
    steps = []

    def noted(self, state, batch, *rest):
        steps.append(batch.number)
        return iteration(self, state, batch, *rest)

    monkeypatch.setattr(ppo.Loop, "iteration", noted)
    assert mpo("run", MICRO, f"workdir={copied}") == 0
    assert steps == [2], "the first two iterations must come from the checkpoint"
    for model in ("model", "critic"):
        files = [folder / "stages" / name / model / "model.safetensors" for folder in (finished, copied)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_critic_warmup_that_leaves_the_actor_nothing_is_an_error(copied, capsys):
    assert mpo("ppo", MICRO, f"workdir={copied}", "ppo.extras.critic_warmup=3") == 2
    assert "ppo.extras.critic_warmup=3 leaves the actor none of the 3 iterations" in capsys.readouterr().err


@pytest.mark.thorough
def test_every_option_of_ppo_runs_and_shows(copied):
    """The options that are off by default, all on at once, and what each leaves in the metrics."""
    options = (
        "ppo.epochs=2", "ppo.minibatches=2", "ppo.train.accumulation=2", "ppo.extras.whiten_rewards=true",
        "ppo.extras.whiten_advantages=true", "ppo.extras.missing_eos=replace", "ppo.extras.ptx_coef=0.1",
        "ppo.extras.ema_decay=0.9", "ppo.extras.critic_warmup=1", "ppo.kl.adaptive=true", "ppo.kl.stop=1.0e-9",
        "ppo.kl.horizon=40", "ppo.kl.coef=0.1", "ppo.reward_at=ds_chat", "ppo.greedy=true", "ppo.temperature=0.7",
        "ppo.score=normalised",
    )  # fmt: skip
    before = set(stages(copied))
    assert mpo("ppo", MICRO, f"workdir={copied}", *options) == 0
    (name,) = set(stages(copied)) - before
    rows = [json.loads(line) for line in (copied / "stages" / name / "metrics.jsonl").read_text().splitlines()]
    assert "loss/policy_avg" not in rows[0] and "loss/value_avg" in rows[0], "the critic warms up alone"
    assert rows[1]["loss/ptx"] > 0
    raw = [row["objective/scores"] for row in rows]
    np.testing.assert_allclose([row["objective/score_running_mean"] for row in rows], np.cumsum(raw) / [1, 2, 3], 1e-4)
    # the controller lowers the coefficient by a fifth of n / horizon while KL is under its target
    np.testing.assert_allclose(rows[1]["objective/kl_coef"], 0.1 * (1 - 0.2 * 8 / 40), rtol=1e-5)
    model = lambda stage: (copied / "stages" / stage / "model" / "model.safetensors").read_bytes()  # noqa: E731
    assert model(name) != model(manifest_folder(copied, "mpo", "1-dpo").name)


@pytest.mark.thorough
def test_options_of_the_other_stages(tmp_path):
    """Human pairs with signed gaps, DeepSpeed-Chat's reward loss from the base model, IPO with NLL, accumulation."""
    options = (
        "sft.train.accumulation=4", "reward.loss=ds_span", "reward.init=base", "select.pair_source=human",
        "dpo.loss=ipo", "dpo.nll_coef=0.1", "dpo.length_normalised=true", "model.remat=full", "model.logit_chunk=64",
        "model.architecture.tie_embeddings=false", "evaluate.greedy=true", "ppo.train.steps=1",
    )  # fmt: skip
    assert mpo("run", MICRO, f"workdir={tmp_path}", *options) == 0
    table = PairTable.read(tmp_path / "runs/mpo/select")
    assert len(table) == 47 and not table.chosen.any()  # one of the 48 training posts is a test post
    np.testing.assert_allclose(table.gap, table.score[:, 0] - table.score[:, 1], rtol=1e-6)
    first = json.loads((tmp_path / "runs/mpo/1-dpo/metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(first["loss"], 25.0, rtol=1e-3)  # (1 / 2 beta)^2 at policy = reference
    assert first["loss/nll"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dpo.betaa=1"], ["dpo.betaa", "did you mean beta"]),
        (["sft.train.batch_size=many"], ["sft.train.batch_size", "integer"]),
        (["data.kind=hh", "data.path=nowhere.jsonl", "model.path=nowhere"], ["nowhere.jsonl", "data.path"]),
        (["ppo.top_p=0.9"], ["ppo.top_p", "remove it", "KL"]),
        (["mesh.fsdp=3"], ["sft.train.batch_size", "3"]),
        (["mesh.fsdp=64"], ["64", "devices"]),
        (["text.max_prompt_tokens=100"], ["max_prompt_tokens", "positions"]),
        (["data.kind=pairs", f"data.path={MICRO}"], [f"{MICRO}: ", ".jsonl", ".parquet"]),
        (["experiment=nonsense"], ["experiment"]),
        (["workdir=/dev/null/below-a-file"], ["cannot write to workdir /dev/null/below-a-file", "workdir=DIR"]),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(overrides, words, tmp_path, capsys):
    assert mpo("run", MICRO, f"workdir={tmp_path}", *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in words:
        assert word in error
    assert not stages(tmp_path)


def test_no_easy_pair_is_an_error_that_names_the_gaps(copied, capsys):
    overrides = ("select.easy_fraction=null", "select.threshold=50")
    assert mpo("run", MICRO, f"workdir={copied}", *overrides) == 2
    assert "no pair is easy at threshold 50" in capsys.readouterr().err


def test_broken_rows_name_their_line(tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    model.mkdir()
    assert (
        mpo("run", MICRO, f"workdir={tmp_path / 'w'}", "data.kind=pairs", f"data.path={data}", f"model.path={model}")
        == 2
    )
    assert f"{data}:2" in capsys.readouterr().err


def test_full_disk_is_one_message(monkeypatch, tmp_path, capsys):
    import errno

    from mpo_jax.models import loading

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(loading, "save", full)
    assert mpo("sft", MICRO, f"workdir={tmp_path}", "sft.train.steps=1") == 2
    error = capsys.readouterr().err
    assert "no space left" in error and "Traceback" not in error
    assert not stages(tmp_path)


@pytest.mark.thorough
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("size", ["400k", "1900k"])
def test_a_disk_that_really_fills_up_is_one_message(tmp_path, size):
    """At the first checkpoint (400k) and while TensorBoard, checkpoint or model are being written (1900k)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        command = [sys.executable, "-c", "from mpo_jax.cli.app import main; main()"]
        given = "model.architecture.hidden_size=96", f"runtime.compilation_cache={jax.config.jax_compilation_cache_dir}"
        result = subprocess.run([*command, "sft", MICRO, f"workdir={disk}", *given], capture_output=True, text=True)
        finished = stages(disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert result.returncode == 2 and not finished
    assert "no space left" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_workdir_is_one_message(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert mpo("run", MICRO, f"workdir={tmp_path / 'w'}") == 2
    assert "cannot write to workdir" in capsys.readouterr().err


def test_checkpoint_of_another_shape_is_refused(tmp_path, capsys):
    """A left-over of another model in the stage's folder is named, not loaded."""
    import jax.numpy as jnp

    from mpo_jax.training.checkpoints import Checkpoints

    assert mpo("sft", MICRO, f"workdir={tmp_path}") == 0
    name = next(iter(stages(tmp_path)))
    shutil.rmtree(tmp_path / "stages" / name)
    checkpoints = Checkpoints(tmp_path / "stages" / f".{name}.partial" / "checkpoints", keep=1)
    checkpoints.save(2, {"params": jnp.zeros((3, 3))})
    checkpoints.close()
    assert mpo("sft", MICRO, f"workdir={tmp_path}") == 2
    assert "does not fit this configuration" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    from mpo_jax.errors import UserError

    with pytest.raises(UserError):
        mpo("run", MICRO, "dpo.betaa=1", "--debug")


def test_config_prints_what_it_can_read_back(capsys, tmp_path):
    assert mpo("config", MICRO, "seed=7", "dpo.beta=0.25") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert mpo("config", printed) == 0
    assert capsys.readouterr().out == printed.read_text()
    assert "seed: 7" in printed.read_text() and "beta: 0.25" in printed.read_text()


@pytest.mark.thorough
def test_table_over_seeds(tmp_path, capsys):
    assert mpo("table", MICRO, f"workdir={tmp_path}", "experiment=sft", "--seeds", "0,1") == 0
    assert "2 seeds" in capsys.readouterr().out
    assert len((tmp_path / "tables" / "by_seed.csv").read_text().splitlines()) == 3
    assert mpo("table", MICRO, "--seeds", "one") == 2
