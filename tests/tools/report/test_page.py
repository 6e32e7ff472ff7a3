"""The HTML report: whole, self-contained, escaped, equal to its rows, and never half-written."""

import base64
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.tools.report import canvas
from mpo_jax.tools.report.canvas import Chart
from mpo_jax.tools.report.figures import pareto
from mpo_jax.tools.report.page import write_report
from mpo_jax.tools.report.provenance import commands
from mpo_jax.tools.report.results import collect
from mpo_jax.tools.report.samples import side_by_side
from mpo_jax.tools.report.seeds import collect_seeds, over_seeds, pair_differences
from mpo_jax.tools.report.summary import cautions
from tests.tools.report import workdirs
from tests.tools.report.pages import Page, read_csv

RESAMPLES = 50


def as_text(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows as CSV gives them back; the columns are those of all rows."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: "" if row.get(key) is None else str(row[key]) for key in keys} for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with everything, and its report."""
    made = workdirs.make(tmp_path_factory.mktemp("work"), metrics=True, select=True)
    assert write_report(made, resamples=RESAMPLES) == made / "report" / "index.html"
    return made


@pytest.fixture(scope="module")
def page(workdir: Path) -> Page:
    return Page(workdir / "report" / "index.html")


def small_page(workdir: Path) -> Page:
    return Page(write_report(workdir, resamples=RESAMPLES))


def test_all_sections_are_there_in_order(page: Page) -> None:
    assert page.sections == [
        "summary", "samples", "results", "differences", "tradeoff", "length", "training", "overoptimisation",
        "selection", "calibration", "data", "config", "again", "claims",
    ]  # fmt: skip


def test_page_needs_no_other_file_and_no_network(page: Page) -> None:
    # 2 claims, 2 against KL, 1 SFT, 2 reward, 5 DPO, 6 PPO, 1 over-optimisation, 1 histogram, 2 calibration
    assert [name for name, _ in page.tags].count("svg") == 22
    names = {name for name, _ in page.tags}
    assert not names & {"link", "iframe", "object", "embed", "base", "form", "img", "image"}
    attributes = [value or "" for _, attributes in page.tags for value in attributes.values()]
    assert not [value for value in attributes if re.search(r"https?:|^//|javascript:", value)]
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp", page.source)


def test_the_browser_may_run_the_page_s_own_script_alone(page: Page) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.S)
    policy = next(value for value in page.all("meta", "content") if "default-src" in value)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert [name for name, _ in page.tags].count("script") == 1


def test_links_lead_to_files_and_sections_that_exist(page: Page, workdir: Path) -> None:
    links = page.all("a", "href")
    assert "../stages/ppo-mpo/" in links
    assert "tables/main.csv" in links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in page.sections
        else:
            assert (workdir / "report" / link).exists(), link


def test_main_table_shows_every_number(page: Page) -> None:
    rows = page.table("run", "reward", "true utility", "KL to SFT", "tokens", "EOS rate", "prompts")
    assert [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in rows] == [
        ["sft", "-0.125 ± 0.011", "2.031 ± 0.021", "0.000 ± 0.000", "15.2 ± 0.5", "100.0% ± 0.0%", "4"],
        ["dpo", "1.021 ± 0.012", "2.717 ± 0.022", "3.701 ± 0.310", "20.8 ± 0.2", "93.1% ± 1.7%", "4"],
        ["mpo", "1.347 ± 0.013", "3.307 ± 0.023", "1.493 ± 0.082", "18.5 ± 0.1", "99.5% ± 0.3%", "4"],
    ]


def test_differences_show_means_and_intervals(page: Page) -> None:
    start = page.rows.index(["run", "against", "reward", "95% interval", "true utility", "95% interval"])
    # every prompt's reward grows by 1 a run and its utility by 0.5, so the intervals have no width
    assert page.rows[start + 1 : start + 4] == [
        ["dpo", "sft", "+1.000", "[+1.000, +1.000]", "+0.500", "[+0.500, +0.500]"],
        ["mpo", "sft", "+2.000", "[+2.000, +2.000]", "+1.000", "[+1.000, +1.000]"],
        ["mpo", "dpo", "+1.000", "[+1.000, +1.000]", "+0.500", "[+0.500, +0.500]"],
    ]


def test_summary_says_what_was_run(page: Page) -> None:
    assert "3 runs (sft, dpo, mpo) on the toy TL;DR world" in page.text
    assert "trained from scratch (2 layers, width 64), seed 0" in page.text
    assert "answered 4 held-out prompts" in page.text


def test_tables_as_csv_equal_the_rows(workdir: Path) -> None:
    results = collect(workdir)
    tables = workdir / "report" / "tables"
    assert read_csv(tables / "main.csv") == as_text(over_seeds({0: results}))
    assert read_csv(tables / "differences.csv") == as_text(pair_differences({0: results}, resamples=RESAMPLES))
    assert read_csv(tables / "data.csv") == as_text([{**workdirs.REPORT, "dropped": '{"empty & void": 2}'}])
    assert [(row["artifact"], row["truncated_prompts"]) for row in read_csv(tables / "truncation.csv")] == [
        ("sft-1", "3"), ("reward-1", "3"), ("evaluate-sft", "0"), ("evaluate-dpo", "0"), ("evaluate-mpo", "0"),
    ]  # fmt: skip


def test_every_figure_has_its_numbers_beside_it(workdir: Path, page: Page) -> None:
    folder = workdir / "report" / "figures"
    images = {path.stem: path.read_bytes() for path in folder.glob("*.png")}
    assert set(images) == {path.stem for path in folder.glob("*.csv")}
    assert all(image.startswith(b"\x89PNG\r\n") for image in images.values())
    assert {f"figures/{name}.{kind}" for name in images for kind in ("png", "csv")} <= set(page.all("a", "href"))
    assert len(images) == [name for name, _ in page.tags].count("svg")
    assert read_csv(folder / "utility_against_kl.csv")[2] == {
        "run": "mpo", "kl": "1.493", "kl_se": "0.082", "utility": "3.307", "utility_se": "0.023", "pareto": "True",
    }  # fmt: skip


def test_a_curve_holds_each_artifact_once_under_the_names_of_its_runs(workdir: Path) -> None:
    folder = workdir / "report" / "figures"
    sft = read_csv(folder / "sft_loss.csv")
    assert [(row["series"], row["step"]) for row in sft] == [("sft, dpo, mpo", step) for step in ("1", "5", "10")]
    margins = read_csv(folder / "dpo_rewards_margins.csv")
    assert [row["series"] for row in margins] == ["dpo"] * 3 + ["mpo"] * 3
    assert float(margins[4]["rewards/margins"]) == pytest.approx(0.1 + 0.2 - 0.05)


def test_selection_shows_the_sizes_and_marks_the_threshold_used(page: Page, workdir: Path) -> None:
    # gaps 0, 0.5, 1, 1.5, 2: above 1 lie two, both ordered right; the truth contradicts the three others
    assert ["1 (used)", "2", "3", "40.0%", "100.0%", "0.0%"] in page.rows
    assert ["3", "0", "5", "0.0%", "-", "40.0%"] in page.rows
    assert sum("(used)" in row[0] for row in page.rows) == 1
    gaps = read_csv(workdir / "report" / "figures" / "gaps.csv")
    assert sum(int(row["pairs"]) for row in gaps) == 5
    assert (float(gaps[0]["low"]), float(gaps[-1]["high"])) == (0.0, 2.0)


def test_accuracy_by_gap_has_all_three_sources_with_intervals(page: Page, workdir: Path) -> None:
    rows = read_csv(workdir / "report" / "figures" / "accuracy_by_gap.csv")
    assert list(dict.fromkeys(row["source"] for row in rows)) == [
        "held-out pairs against their labels", "held-out pairs against the truth", "sampled pairs against the truth",
    ]  # fmt: skip
    # Wilson: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = 5/8, n = 8, z = 1.96
    assert float(rows[0]["ci_low"]) == pytest.approx(0.30574, abs=1e-4)
    assert float(rows[0]["ci_high"]) == pytest.approx(0.86316, abs=1e-4)
    assert ["0 to 0.5", *["62.5% of\N{NO-BREAK SPACE}8"] * 3] in page.rows
    assert "agrees with 74.5% of the labels, and with the truth in 86.3%" in " ".join(page.text.split())


def test_samples_are_side_by_side_with_reward_and_utility(page: Page) -> None:
    articles = page.source.split('id="sample-list"')[1].split('<article class="sample"')[1:]
    assert len(articles) == 4
    words = " ".join(re.sub(r"<[^>]*>", " ", articles[2]).split())
    expected = (
        "Prompt 3, mpo against dpo +0.500 true utility",
        "prompt 2",
        "sft reward 2.25, true utility 4.00 sft answers 2",
        "mpo reward 4.25, true utility 5.00",
    )
    assert all(part in words for part in expected), words


def test_what_no_policy_read_of_a_prompt_is_marked(tmp_path: Path) -> None:
    rows = [
        {"prompt": "cut <off>, read", "response": "r", "score": 1.0, "shown": "read"},
        {"prompt": "whole", "response": "r", "score": 1.0},
        {"prompt": "asked", "response": "r", "score": 1.0, "shown": "<user>asked<end>"},
    ]
    workdirs.make(tmp_path, ("sft",), utility=False, sampled={"sft": rows})
    source = write_report(tmp_path, resamples=RESAMPLES).read_text(encoding="utf-8")
    # in the list, and beside each other on the first screen
    assert source.count('class="unread"') == source.count('title="cut to fit">cut &lt;off&gt;, </span>read</div>') == 2
    assert "no policy read it" in source
    for row in rows:
        row.pop("shown", None)
    workdirs.make(tmp_path / "whole", ("sft",), utility=False, sampled={"sft": rows})
    page = write_report(tmp_path / "whole", resamples=RESAMPLES).read_text(encoding="utf-8")
    assert "unread" not in page.split("</style>")[1]


def test_environment_and_commands(page: Page, workdir: Path) -> None:
    assert "<pre>mpo run &#39;my config.yaml&#39;</pre>" in page.source
    assert f"mpo run {workdir}/runs/sft/config.yaml workdir={workdir}-again" in page.text
    assert page.source.count("<pre>") == 2
    assert ["packages", "jax 0.10.2"] in page.rows
    assert ["python", "3.11.0"] in page.rows


def test_the_same_runs_give_the_same_bytes(workdir: Path) -> None:
    before = contents(workdir / "report")
    write_report(workdir, resamples=RESAMPLES)
    assert contents(workdir / "report") == before


def test_held_out_curves_are_explained_where_there_are_any(tmp_path: Path, page: Page) -> None:
    assert "of held-out rows" not in page.text
    made = workdirs.make(tmp_path, ("sft",), metrics=True)
    with (made / "stages" / "sft-1" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "eval/loss": 2.75}) + "\n")
    assert "dashed lines with hollow markers are of held-out rows" in small_page(made).text


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    answer = '"><img src=x onerror=alert(2)> {{ 7 * 7 }} \ud800'
    sampled = {"sft": [{"prompt": attack, "response": answer, "score": 0.5, "kl": 0.0, "has_eos": False}]}
    page = small_page(workdirs.make(tmp_path, ("sft",), sampled=sampled))
    assert [name for name, _ in page.tags].count("script") == 1 and "onerror" not in str(page.tags)
    assert "img" not in dict(page.tags)
    assert attack in page.text
    # a lone surrogate is no text that a file could hold
    assert answer.replace("\ud800", "?") in page.text
    assert "cut at the limit" in page.text
    assert ["pairs <b>file</b>", "12", "10", "empty & void: 2"] in page.rows


def test_without_truth_nothing_is_said_of_it(tmp_path: Path) -> None:
    page = small_page(workdirs.make(tmp_path, utility=False, select=True))
    assert "utility" not in page.text
    assert ["run", "reward", "KL to SFT", "tokens", "EOS rate", "prompts"] in page.rows
    assert "mpo has the highest reward, clearly above sft (+2.000 [+2.000, +2.000])" in page.text
    assert ["1 (used)", "2", "3", "40.0%"] in page.rows
    assert not (tmp_path / "report" / "figures" / "utility_against_kl.png").exists()
    rows = read_csv(tmp_path / "report" / "figures" / "accuracy_by_gap.csv")
    assert {row["source"] for row in rows} == {"held-out pairs against their labels"}


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    config = Config(workdir="w", experiment=("sft",), evaluate={"num_samples_shown": 0})  # type: ignore[arg-type]
    page = small_page(workdirs.make(tmp_path, ("sft",), configs={"sft": config}))
    assert page.sections == ["summary", "results", "tradeoff", "length", "calibration", "data", "config", "again"]
    assert not (tmp_path / "report" / "figures" / "gaps.csv").exists()
    assert not (tmp_path / "report" / "tables" / "differences.csv").exists()
    assert "#differences" not in page.all("a", "href")


def test_a_reward_model_that_was_not_measured_has_no_accuracy(tmp_path: Path) -> None:
    workdir = workdirs.make(tmp_path, utility=False)
    for path in workdir.glob("stages/reward-*/manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["summary"] |= {"held_out_accuracy": None, "accuracy_by_gap": None}
        path.write_text(json.dumps(manifest), encoding="utf-8")
    assert "the reward model agrees" not in small_page(workdir).text


def test_as_many_samples_as_configured(tmp_path: Path) -> None:
    config = Config(workdir="w", evaluate={"num_samples_shown": 1})  # type: ignore[arg-type]
    page = small_page(workdirs.make(tmp_path, ("sft",), configs={"sft": config}))
    assert "sft answers 0" in page.text
    assert "sft answers 1" not in page.text


def test_runs_with_other_thresholds_show_their_own_split(tmp_path: Path) -> None:
    fraction = Config(workdir="w", select={"threshold": None, "easy_fraction": 0.8})  # type: ignore[arg-type]
    made = workdirs.make(tmp_path, ("dpo", "mpo"), select=True, configs={"mpo": fraction})
    page = small_page(made)
    used = [row[:3] for row in page.rows if "(used)" in row[0]]
    assert used == [["1 (used)", "2", "3"], ["0 (used)", "4", "1"]]
    assert {"gaps.csv", "gaps_2.csv"} < {path.name for path in (made / "report" / "figures").iterdir()}


def test_runs_that_do_not_compare_are_cautioned(tmp_path: Path, page: Page) -> None:
    made = workdirs.make(tmp_path, ("sft", "dpo"), reward_ids={"dpo": "reward-2"})
    caution = "scored by different reward models"
    assert caution in small_page(made).text
    assert caution not in page.text


def test_an_interval_that_holds_zero_is_no_clear_difference(tmp_path: Path) -> None:
    def scored(*scores: float) -> list[dict[str, Any]]:
        return [{"prompt": str(i), "response": "r", "score": score} for i, score in enumerate(scores)]

    sampled = {"sft": scored(0, 0, 0, 0), "dpo": scored(2, -1, 1, -1), "mpo": scored(-2, -3, -2, -4)}
    made = workdirs.make(tmp_path, utility=False, sampled=sampled)
    page = small_page(made)
    assert ["MPO better than DPO", "contradicted", "reward", "-3.000"] in [row[:4] for row in page.rows]
    (gain,) = (row for row in page.table("run", "reward", "KL to SFT") if row[0] == "dpo")
    assert gain[1] == "+0.250[-2.170, +2.508]"
    assert "<b>+0.250</b>" not in page.source and "<b>-3.000</b>" in page.source


@pytest.mark.thorough
def test_a_killed_run_leaves_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = workdirs.make(tmp_path, ("sft",))
    written: list[str] = []

    def killed(self: Chart, folder: Path) -> None:
        written.append(self.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        real(self, folder)

    real = Chart.write
    monkeypatch.setattr(Chart, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(made, resamples=RESAMPLES)
    assert not (made / "report").exists()

    monkeypatch.setattr(Chart, "write", real)
    write_report(made, resamples=RESAMPLES)
    before = contents(made / "report")
    written.clear()
    monkeypatch.setattr(Chart, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(made, resamples=RESAMPLES)
    assert contents(made / "report") == before

    # killed between the two renames: the old report is aside, and the next try brings it back before all else
    (made / "report").rename(made / ".report.old")
    written.clear()
    with pytest.raises(KeyboardInterrupt):
        write_report(made, resamples=RESAMPLES)
    assert contents(made / "report") == before

    monkeypatch.setattr(Chart, "write", real)
    (made / "report" / "tables" / "mine.csv").touch()
    with pytest.raises(UserError, match=r"mine\.csv is no part of a report"):
        write_report(made, resamples=RESAMPLES)
    (made / "report" / "tables" / "mine.csv").unlink()
    write_report(made, resamples=RESAMPLES)
    assert contents(made / "report") == before
    assert not (made / ".report.partial").exists() and not (made / ".report.old").exists()


def test_runs_keep_their_look_and_no_two_look_the_same() -> None:
    looks = [tuple(canvas.style(run).values()) for run in [*canvas.EXPERIMENTS, "mpo_t2", "mpo_t3", "mpo_f0.25"]]
    assert len(set(looks)) == len(looks) == 15
    assert canvas.style("sft")["color"] == "#000000"


def test_model_size_is_counted_from_the_weights_headers(tmp_path: Path) -> None:
    made = workdirs.make(tmp_path, ("sft",))
    folder = made / "stages" / "sft-1" / "model"
    folder.mkdir()
    save_file({"a": np.zeros((300, 100), np.float32), "b": np.zeros(5000, np.float16)}, folder / "model.safetensors")
    assert "a model of 0.04 million parameters trained from scratch" in small_page(made).text


def test_weights_that_cannot_be_read_leave_the_size_out(tmp_path: Path) -> None:
    made = workdirs.make(tmp_path, ("sft",))
    folder = made / "stages" / "sft-1" / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(100))
    assert "a model trained from scratch" in small_page(made).text


@pytest.mark.parametrize("score", [None, "high", True, float("inf"), 1e300, float("nan"), ...])
def test_a_sample_without_a_finite_score_is_damage(tmp_path: Path, score: Any) -> None:
    rows = [{"prompt": "p", "response": "r", "score": 1.0}, {"prompt": "q", "response": "r", "score": score}]
    if score is ...:
        del rows[1]["score"]
    workdirs.make(tmp_path, ("sft",), utility=False, sampled={"sft": rows})
    with pytest.raises(UserError, match=r"samples.jsonl has no number for score in line 2: delete the folder"):
        write_report(tmp_path, resamples=RESAMPLES)


def test_seeds_of_different_settings_are_cautioned_and_repeated_one_by_one(tmp_path: Path) -> None:
    """A table's last call stands for all runs only if it makes them all."""
    for seed, beta in ((0, 0.1), (1, 0.5)):
        config = Config.model_validate({"workdir": "w", "seed": seed, "dpo": {"beta": beta}})
        made = workdirs.make(tmp_path / f"seed-{seed}", ("sft", "dpo"), configs={"sft": config, "dpo": config})
        (stage,) = made.glob("stages/dpo-dpo*/manifest.json")
        manifest = json.loads(stage.read_text())
        stage.write_text(json.dumps({**manifest, "settings": {"seed": seed, "loss": {"beta": beta}}}))
    last = {"workdir": str(tmp_path), "dpo": {"beta": 0.5}, "table": {"seeds": [1], "experiment": ["sft", "dpo"]}}
    (tmp_path / "table.yaml").write_text(to_yaml(Config.model_validate(last)), encoding="utf-8")
    by_seed = collect_seeds(tmp_path)
    assert cautions(by_seed) == ["dpo: its mean is over seeds of different settings (1-dpo.loss.beta)"]
    assert [row["again"].split()[:2] for row in commands(tmp_path, by_seed)] == [["mpo", "run"]] * 2
    alike = {"workdir": str(tmp_path), "dpo": {"beta": 0.5}, "table": {"seeds": [0, 1], "experiment": ["sft", "dpo"]}}
    (tmp_path / "table.yaml").write_text(to_yaml(Config.model_validate(alike)), encoding="utf-8")
    assert len(commands(tmp_path, by_seed)) == 2
    alike = {seed: [by_seed[1][0], by_seed[1][1]] for seed in (0, 1)}
    assert cautions(alike) == [] and [row["again"] for row in commands(tmp_path, alike)] == [
        f"mpo table {tmp_path}/table.yaml workdir={tmp_path}-again"
    ]


@pytest.mark.thorough
def test_a_table_s_seeds_make_one_page(tmp_path: Path) -> None:
    for seed in (0, 1):
        config = Config(workdir="w", seed=seed)
        workdirs.make(tmp_path / f"seed-{seed}", ("sft", "mpo"), configs={"sft": config, "mpo": config}, metrics=True)
    page = small_page(tmp_path)
    assert "2 runs (sft, mpo)" in page.text and "seeds 0, 1" in page.text and "(crossed)" in page.text
    assert ["seed", "0", "seed 0: sft, seed 0: mpo"] in page.rows
    folder = tmp_path / "report" / "figures"
    # both seeds logged the same, so the band has no width
    rows = read_csv(folder / "sft_loss.csv")
    assert [(row["step"], row["loss_low"] == row["loss_high"]) for row in rows] == [(s, True) for s in ("1", "5", "10")]
    assert "../seed-1/stages/ppo-mpo.1/" in page.all("a", "href")
    assert all((tmp_path / "report" / link).exists() for link in page.all("a", "href") if not link.startswith("#"))


def test_samples_are_the_largest_differences_and_the_first() -> None:
    def result(name: str, scores: list[float]) -> Any:
        rows = [{"prompt": f"p{i}", "response": name, "score": score} for i, score in enumerate(scores)]
        return SimpleNamespace(name=name, samples=lambda: rows)

    size = 10
    found = side_by_side(
        [result("ppo", [0.0] * size), result("mpo", [0.0, 0.1, 0.2, 0.3, -9.0, 0.5, 0.6, 7.0, 0.8, 0.9])], 4
    )
    assert (found.first, found.second, found.measure, found.total) == ("mpo", "ppo", "reward", 10)
    assert [(row["number"], row["difference"]) for row in found.rows] == [(5, -9.0), (8, 7.0), (2, 0.1), (1, 0.0)]
    assert len(side_by_side([result("sft", [1.0, 2.0])], 9).rows) == 2


def test_the_front_is_of_runs_that_no_other_beats() -> None:
    rows = [{"kl": kl, "score": score} for kl, score in ((0.0, 0.0), (1.0, 2.0), (2.0, 1.0), (2.0, 3.0), (1.0, 2.0))]
    assert pareto(rows, "score") == [True, True, False, True, True]
