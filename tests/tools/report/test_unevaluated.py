"""The page of runs that were trained up to some stage, and what `mpo report` says of them."""

import json
import shutil

import pytest

from mpo_jax.errors import Damaged
from mpo_jax.tools.report.results import collect_unevaluated
from tests.pipeline.test_pipeline import mpo
from tests.tools.report import workdirs
from tests.tools.report.pages import Page, read_csv


def forget_evaluation(workdir, run, *also):
    """What a run leaves that was made up to its last step."""
    folder = workdir / "runs" / run
    for role in ("evaluate", *also):
        (folder / role).unlink()
    environment = json.loads((folder / "env.json").read_text())
    made = sorted(link.name for link in folder.iterdir() if link.is_symlink())
    (folder / "env.json").write_text(json.dumps({**environment, "stages": made}))


@pytest.fixture
def workdir(tmp_path):
    made = workdirs.make(tmp_path, ("dpo", "mpo"), metrics=True, select=True)
    forget_evaluation(made, "dpo", "reward", "select")
    return made


def test_trained_runs_have_a_page(workdir, capsys):
    forget_evaluation(workdir, "mpo")
    shutil.rmtree(workdir / "stages" / "evaluate-mpo")
    assert mpo("report", workdir) == 0
    said = capsys.readouterr().out
    page = Page(workdir / "report" / "index.html")
    assert f"report: {workdir / 'report' / 'index.html'}" in said
    assert said.count("has no evaluation") == 2 and "1-dpo" in said
    for run in ("dpo", "mpo"):
        command = f"mpo evaluate {workdir / 'runs' / run / 'config.yaml'}"
        assert command in said and f"<code>{command}</code>" in page.source
    assert f"mpo dpo {workdir}/runs/dpo/config.yaml workdir={workdir}-again" in page.text
    assert f"mpo ppo {workdir}/runs/mpo/config.yaml workdir={workdir}-again" in page.text
    assert page.sections == ["summary", "training", "selection", "data", "config", "again"]
    assert "Trained, not evaluated" in page.text and "main.csv" not in page.text
    # a stage that both runs share is one row
    rows = read_csv(workdir / "report" / "tables" / "last_measures.csv")
    assert [row["artifact"] for row in rows] == ["sft-1", "dpo-dpo", "reward-1", "dpo-mpo", "ppo-mpo"]
    assert float(rows[1]["rewards/margins"]) == pytest.approx(workdirs.METRICS["dpo"]["rewards/margins"])
    assert (workdir / "report" / "figures" / "dpo_rewards_margins.png").is_file()


def test_an_evaluated_run_beside_it_has_the_usual_page(workdir, capsys):
    assert mpo("report", workdir) == 0
    said = capsys.readouterr().out
    assert "dpo has no evaluation" in said and "mpo has no evaluation" not in said
    assert "results" in Page(workdir / "report" / "index.html").sections


def test_a_trained_run_without_one_of_its_stages_is_damaged(workdir):
    assert [run.name for run in collect_unevaluated(workdir)] == ["dpo"]
    (workdir / "runs" / "dpo" / "1-dpo").unlink()
    with pytest.raises(Damaged, match=r"dpo has no link to its 1-dpo: delete the folder"):
        collect_unevaluated(workdir)
