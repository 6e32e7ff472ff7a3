"""Weights & Biases without a network: what an offline run holds, and that nothing W&B does can end a stage."""

import http.server
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config, RuntimeConfig, WandbConfig
from mpo_jax.errors import UserError
from mpo_jax.tools import doctor
from mpo_jax.tools.report.page import write_report
from mpo_jax.training import wandb_log
from tests.pipeline.test_pipeline import MICRO, mpo
from tests.tools.report import workdirs
from tests.training.test_loop import run_fit
from tests.wandb_records import written

wandb = pytest.importorskip("wandb", exc_type=ImportError)

KEY = "k" * 40
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module", autouse=True)
def service():
    """Ended with the module."""
    yield
    wandb.teardown()


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """W&B's folders, and no credentials, whatever the machine has."""
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home" / name))
    for name in ("MODE", "API_KEY", "IDENTITY_TOKEN_FILE", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb_log, "_session", wandb_log._Session())


def configured(workdir: Path, mode: str | None = "offline") -> Config:
    settings = WandbConfig(project="mine", entity="team", mode=mode)  # type: ignore[arg-type]
    return Config(workdir=str(workdir), seed=3, runtime=RuntimeConfig(tensorboard=False, wandb=settings))


def run_stage(config: Config, folder: Path, **options: Any) -> None:
    """SFT steps in this folder, logged as the configuration says."""
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb_log.stage_run(config, folder, "sft", folder.name)
    assert run is not None
    run_fit(folder, log=(run,), **options)


def test_a_stage_s_run_holds_its_configuration_and_every_metric(tmp_path):
    config, folder = configured(tmp_path / "work"), tmp_path / "work" / "stages" / "sft-1"
    run_stage(config, folder, steps=3)
    (run,) = written(tmp_path / "work")
    assert (run.run.project, run.run.entity, run.run.run_group) == ("mine", "team", "work")
    assert (run.run.job_type, run.run.display_name, run.exit_code) == ("sft", "sft-1", 0)
    assert {k: v for k, v in run.config.items() if k != "_wandb"} == config.model_dump(mode="json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("state_hash", None)
    assert [{k: v for k, v in row.items() if k not in ("_step", "_timestamp", "_runtime")} for row in run.rows] == lines
    assert len(lines) == 3 and {"loss", "grad_norm"} < set(lines[0])
    assert run.metrics == [("step", ""), ("*", "step")]


@pytest.mark.thorough
def test_a_stage_that_goes_on_goes_on_in_its_run(tmp_path):
    """It died in step 6 and goes on from the checkpoint of step 4: step 5 is there twice, with the same numbers."""
    config, folder = configured(tmp_path / "work"), tmp_path / "work" / "stages" / "sft-1"
    with pytest.raises(RuntimeError, match="killed"):
        run_stage(config, folder, die_at=5)
    time.sleep(1.1)  # W&B names folders by the second
    run_stage(config, folder)
    killed, resumed = written(tmp_path / "work")
    assert killed.run.run_id == resumed.run.run_id and killed.run.resume and resumed.run.resume
    assert (killed.exit_code, resumed.exit_code) == (1, 0)
    assert [row["step"] for row in killed.rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in resumed.rows] == [5, 6, 7]
    assert killed.rows[4]["loss"] == resumed.rows[0]["loss"]


def test_nothing_of_the_machine_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_stage(configured(tmp_path), tmp_path / "stages" / "sft-1", steps=2)
    (run,) = written(tmp_path)
    assert run.kinds == {"header", "run", "telemetry", "metric", "history", "summary", "exit"}
    assert run.run.host == "-" and not run.run.HasField("git")
    assert [path for path in (tmp_path / "wandb").glob("*run-*/files/**/*") if path.is_file()] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_the_report_is_an_artifact_and_its_table_the_summary(tmp_path, capsys):
    config = configured(tmp_path / "work")
    workdir = workdirs.make(tmp_path / "work", ("sft", "mpo"), configs={"sft": config, "mpo": config})
    assert mpo("report", str(workdir)) == 0
    (run,) = written(workdir)
    assert (run.run.job_type, run.run.run_group) == ("report", "work")
    (artifact,) = run.artifacts
    assert (artifact.type, artifact.name, list(artifact.aliases)) == ("report", "report-work", ["latest"])
    there = {path.relative_to(workdir).as_posix() for path in (workdir / "report").rglob("*") if path.is_file()}
    held = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    assert {"report/index.html", "report/tables/main.csv"} < there == set(held)
    copies = {name: Path(place).read_bytes() for name, place in held.items()}
    assert copies == {name: (workdir / name).read_bytes() for name in there}
    assert run.summary["mpo/score"] == workdirs.SUMMARIES["mpo"]["score"]
    assert run.summary["sft/kl_se"] == 0.0
    assert str(workdir / "report" / "index.html") in capsys.readouterr().out


def test_a_table_s_report_holds_its_tables_and_a_seed_s_run_is_in_its_group(tmp_path):
    workdir = workdirs.make(tmp_path / "table", ("sft",))
    write_report(workdir, resamples=20)
    (workdir / "tables").mkdir()
    (workdir / "tables" / "claims.csv").write_text("claim\n")
    wandb_log.log_report(configured(workdir), workdir)
    run_stage(configured(workdir / "seed-3"), workdir / "seed-3" / "stages" / "sft-1", steps=1)
    (report,), (stage,) = written(workdir), written(workdir / "seed-3")
    assert "tables/claims.csv" in {entry.path for entry in report.artifacts[0].manifest.contents}
    assert report.run.run_group == stage.run.run_group == "table"


def test_a_server_that_does_not_answer_is_asked_once(tmp_path, monkeypatch, capsys):
    """Runs are then kept on disk, and training makes what it makes without W&B."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_log, "INIT_TIMEOUT_S", 0.5)
    config = configured(tmp_path / "work", "online")
    for name in ("sft-1", "sft-2"):
        run_stage(config, tmp_path / "work" / "stages" / name, steps=2)
    told = capsys.readouterr().out
    assert told.count(f"{NOWHERE} cannot be used") == 1 and KEY not in told
    assert [(run.run.display_name, len(run.rows)) for run in written(tmp_path / "work")] == [("sft-1", 2), ("sft-2", 2)]


@pytest.fixture
def server(monkeypatch):
    """A W&B server that answers until `went_away` is set, as far as starting a run needs it."""
    went_away = threading.Event()
    bucket = {
        "id": "b", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0,
        "project": {"id": "p", "name": "mine", "entity": {"id": "e", "name": "team"}},
    }  # fmt: skip
    answers = {
        "RunResumeStatus": {"model": None},
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
            asked = next((name for name in answers if name in body), None)
            self.send_response(503 if went_away.is_set() else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"data": answers.get(asked, {})}).encode())

        do_GET = do_PUT = do_POST

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield went_away
        wandb.teardown()
        listening.shutdown()


def test_a_server_that_goes_away_holds_no_stage_up(server, tmp_path, monkeypatch, capsys):
    """The stage ends once the time for the rest is over; the next one is kept on disk from the start."""
    monkeypatch.setattr(wandb_log, "FINISH_TIMEOUT_S", 0.5)
    config = configured(tmp_path, "online")
    run_stage(config, tmp_path / "stages" / "sft-1", steps=2, at=lambda k: server.set())
    assert "team/mine/runs/" in (told := capsys.readouterr().out) and "could not end a run: TimeoutError" in told
    run_stage(config, tmp_path / "stages" / "sft-2", steps=2)
    assert [(run.run.display_name, len(run.rows)) for run in written(tmp_path)] == [("sft-2", 2)]


def test_errors_of_the_package_end_no_stage(tmp_path, capsys):
    class Broken:
        def log(self, values):
            raise OSError(f"pipe of {KEY}")

        def finish(self, exit_code):
            raise TimeoutError

    config = configured(tmp_path, "offline")
    for method in ("write", "close"):
        run = wandb_log.stage_run(config, tmp_path / method, "sft", "sft-1")
        assert run is not None
        run._run.finish()
        run._run = Broken()
        for _ in range(2):
            run.write(1, {"loss": 0.5}) if method == "write" else run.close()
        run.close()
    told = capsys.readouterr().out
    assert told.count("W&B could not log a run: OSError") == told.count("W&B could not end a run: TimeoutError") == 1
    assert KEY not in told
    assert wandb_log._session.unreachable, "the next run must not wait as long"


@pytest.mark.parametrize("settings", [None, WandbConfig(mode="disabled")])
def test_off(settings, tmp_path, monkeypatch):
    """Then the package is not even needed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = Config(workdir=str(tmp_path), runtime=RuntimeConfig(wandb=settings))
    assert wandb_log.stage_run(config, tmp_path, "sft", "sft-1") is None
    wandb_log.log_report(config, tmp_path)
    assert wandb_log.check(settings) is None and list(tmp_path.iterdir()) == []


def test_where_no_mode_is_given_the_environment_says_which(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_log.check(WandbConfig()) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_log.check(WandbConfig()) is None and wandb_log.check(WandbConfig(mode="offline")) == "offline"


def test_credentials_are_looked_for_before_anything_is_made(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"WANDB_API_KEY .* runtime\.wandb\.mode=offline"):
        wandb_log.check(WandbConfig())
    for command in ("run", "sft", "table"):
        assert mpo(command, MICRO, f"workdir={tmp_path / 'work'}", "runtime.wandb.project=mine") == 2
        assert f"no credentials for {NOWHERE}" in capsys.readouterr().err
    assert not (tmp_path / "work" / "stages").exists()
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert wandb_log.check(WandbConfig()) == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_log.check(WandbConfig()) == "online"


def test_without_the_package_the_message_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert mpo("sft", MICRO, f"workdir={tmp_path / 'work'}", "runtime.wandb.mode=offline") == 2
    assert "bash launch/setup.sh wandb" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_doctor_says_what_is_missing(monkeypatch):
    assert doctor.wandb(WandbConfig()).verdict == "fail"
    assert doctor.wandb(WandbConfig(mode="offline")).verdict == "ok"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    found = doctor.wandb(WandbConfig())
    assert found.verdict == "warn" and "mode=offline" in found.advice and KEY not in str(found)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "launch/setup.sh wandb" in doctor.wandb(WandbConfig(mode="offline")).advice


def test_keys():
    """The section is absent by default, and one key is enough for it to be there."""
    assert Config().runtime.wandb is None
    found = load_config(MICRO, ("runtime.wandb.mode=offline",)).runtime.wandb
    assert found == WandbConfig(project="mpo_jax", entity=None, mode="offline")
    assert load_config(MICRO, ("runtime.wandb.mode=offline", "runtime.wandb=null")).runtime.wandb is None
    with pytest.raises(UserError, match=r"unknown key runtime\.wandb\.projekt .* did you mean project"):
        load_config(MICRO, ("runtime.wandb.projekt=x",))
    with pytest.raises(UserError, match=r"runtime\.wandb\.project"):
        load_config(MICRO, ("runtime.wandb.project=a/b",))
