"""The report's first screen: the verdict, gains on SFT, an example, what it took; and the page on screen and paper."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpo_jax.config.schema import Config
from mpo_jax.tools.report import canvas, figures, provenance, summary
from mpo_jax.tools.report.page import write_report
from mpo_jax.tools.report.results import collect
from mpo_jax.tools.report.samples import Samples, example
from mpo_jax.tools.report.seeds import BySeed, over_seeds
from mpo_jax.tools.report.spent import spent
from tests.pipeline.test_pipeline import mpo
from tests.tools.report import workdirs
from tests.tools.report.pages import Page

FINISHED = 1_790_000_000  # 2026-09-21 14:13:20 UTC


def with_seconds(workdir: Path, seconds: dict[str, float], devices: list[str] | None = None) -> Path:
    """Artifacts by name get their time, and all of them one date."""
    for path in workdir.glob("stages/*/manifest.json"):
        if path.parent.name in seconds:
            manifest = json.loads(path.read_text(encoding="utf-8")) | {"seconds": seconds[path.parent.name]}
            path.write_text(json.dumps(manifest), encoding="utf-8")
        os.utime(path, (FINISHED, FINISHED))
    if devices is not None:
        for path in workdir.glob("runs/*/env.json"):
            path.write_text(json.dumps({"devices": devices}), encoding="utf-8")
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = workdirs.make(tmp_path_factory.mktemp("work"))
    seconds = {"sft-1": 3600.0, "reward-1": 60.0, "dpo-dpo": 30.0, "dpo-mpo": 20.0, "ppo-mpo": 85.0}
    (made / "stages" / "ppo-mpo" / "model").mkdir()
    return with_seconds(made, seconds | {f"evaluate-{run}": 5.0 for run in ("sft", "dpo", "mpo")})


@pytest.fixture(scope="module")
def page(workdir: Path) -> Page:
    return Page(write_report(workdir, resamples=50))


def verdict_of(workdir: Path, *runs: str, **scores: list[float]) -> str:
    """The verdict on runs with these rewards by prompt."""

    def rows(values: list[float]) -> list[dict[str, Any]]:
        return [{"prompt": str(i), "response": "r", "score": value} for i, value in enumerate(values)]

    made = workdirs.make(workdir, runs, utility=False, sampled={run: rows(values) for run, values in scores.items()})
    for run, values in scores.items():
        path = made / "stages" / f"evaluate-{run}" / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["summary"]["score"] = sum(values) / len(values)
        path.write_text(json.dumps(manifest), encoding="utf-8")
    by_seed: BySeed = {0: collect(made)}
    return summary.verdict(by_seed, over_seeds(by_seed), resamples=50)


def test_the_verdict_names_the_best_run_and_how_far_it_is_above_sft_and_the_next(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, "sft", "dpo", "mpo", sft=[0.0] * 4, dpo=[2.0] * 4, mpo=[2.0, 2.0, 2.0, 2.4])
    number = r"[+-]\d\.\d{3}"
    interval = rf"\[{number}, {number}\]"
    assert re.fullmatch(
        rf"mpo has the highest reward, clearly above sft \(\+2.100 {interval}\) and "
        rf"not clearly above dpo \(\+0.100 {interval}\)\.",
        found,
    )


def test_the_verdict_where_nothing_beats_sft(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, "sft", "dpo", sft=[1.0] * 4, dpo=[0.5] * 4)
    assert found == "No run has a higher reward than sft, which is clearly above dpo (+0.500 [+0.500, +0.500])."


def test_the_verdict_on_one_run_compares_nothing(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, "mpo", mpo=[1.0, 2.0])
    assert found == "mpo reaches a reward of 1.500 ± 0.013; there is no other run to compare it with."


def test_runs_of_different_reward_models_are_not_ranked(tmp_path: Path) -> None:
    made = workdirs.make(tmp_path, ("sft", "dpo"), utility=False, reward_ids={"dpo": "reward-2"})
    by_seed: BySeed = {0: collect(made)}
    assert summary.verdict(by_seed, over_seeds(by_seed), resamples=50) == (
        "The runs cannot be ranked by reward: different reward models scored them."
    )


def test_gains_are_differences_to_sft_beside_its_own_means(page: Page) -> None:
    header = next(row for row in page.rows if row[:2] == ["run", "true utility"])
    assert header == ["run", "true utility", "reward", "KL to SFT"]
    assert page.table(*header)[:3] == [
        ["sft", "2.031its mean", "-0.125its mean", "0.00"],
        ["dpo", "+0.500[+0.500, +0.500]", "+1.000[+1.000, +1.000]", "3.70"],
        ["mpo", "+1.000[+1.000, +1.000]", "+2.000[+2.000, +2.000]", "1.49"],
    ]


def test_without_sft_there_are_no_gains(tmp_path: Path) -> None:
    page = Page(write_report(workdirs.make(tmp_path, ("dpo", "mpo")), resamples=50))
    assert "Differences to SFT" not in page.text and "mpo has the highest true utility" in page.text


def test_reward_model_and_truth_may_prefer_different_runs() -> None:
    assert summary.disagreement({"score": "ppo", "utility": "ppo"}) is summary.disagreement({}) is None
    assert "By reward the best run is ppo" in (summary.disagreement({"score": "ppo", "utility": "mpo"}) or "")


def test_the_example_is_the_median_of_the_prompts_that_all_runs_answered() -> None:
    runs = ("sft", "dpo_easy", "dpo", "ppo", "mpo")

    def sample(number: int, difference: float | None, answered: tuple[str, ...] = runs) -> dict[str, Any]:
        return {"number": number, "difference": difference, "answers": [(run, {}) for run in answered]}

    rows = [sample(1, 9.0), sample(2, 1.0), sample(3, -7.0), sample(4, 1.5, ("mpo", "ppo"))]
    found = example(Samples(rows, "mpo", "ppo", "reward", 4))
    assert found is not None and found["number"] == 2
    # in the page's order, of which four stay: SFT, the two that are compared, and the first of the others
    assert [run for run, _ in found["answers"]] == ["sft", "dpo_easy", "ppo", "mpo"]
    alone = example(Samples([sample(2, None), sample(1, None)], None, None, "reward", 2))
    assert alone is not None and alone["number"] == 1
    assert example(Samples([], None, None, "reward", 2)) is None


def test_what_the_stages_took(workdir: Path) -> None:
    found = spent({0: collect(workdir)})
    # evaluations together, and no run's name where all share a stage
    assert [(made.stage, made.runs, made.time) for made in found.stages] == [
        ("SFT", "", "60 min"), ("Reward model", "", "60 s"), ("DPO", "dpo", "30 s"), ("DPO", "mpo", "20 s"),
        ("PPO", "", "85 s"), ("Evaluation", "", "15 s"),
    ]  # fmt: skip
    assert (found.finished, found.devices, found.time) == ("2026-09-21 14:13 UTC", ["1 cpu"], "64 min")
    assert found.device_hours == pytest.approx(3810 / 3600)


def test_a_price_gives_every_stage_s_cost(workdir: Path, tmp_path: Path) -> None:
    found = spent({0: collect(workdir)}, 36.0)
    assert [found.cost(made) for made in found.stages] == ["36.00", "0.60", "0.30", "0.20", "0.85", "0.15"]
    assert found.cost(found) == "38.10" and spent({0: collect(workdir)}).cost(found) == ""
    copied = tmp_path / "work"
    shutil.copytree(workdir, copied, symlinks=True)
    assert mpo("report", str(copied), "--price", "36") == 0
    text = " ".join(re.sub(r"<[^>]*>", " ", (copied / "report" / "index.html").read_text()).split())
    assert "1.1 device hours, cost 38.10 SFT 60 min, cost 36.00 Reward model 60 s, cost 0.60" in text
    assert "Costs are at 36.0 per device-hour." in text
    assert mpo("report", str(copied), "--price", "nan") == 2


def test_a_cost_without_its_time_is_unknown(tmp_path: Path) -> None:
    found = spent({0: collect(workdirs.make(tmp_path, ("sft",)))}, 2.0)
    assert {found.cost(made) for made in (found, *found.stages)} == {"unknown"}


def test_devices_multiply_time_and_what_is_not_recorded_is_not_guessed(tmp_path: Path) -> None:
    chips = [f"TPU_{n}(process=0,(0,0,0,{n}))" for n in range(4)]
    made = with_seconds(workdirs.make(tmp_path, ("sft",)), {"sft-1": 900.0}, chips)
    found = spent({0: collect(made)})
    assert found.devices == ["4 TPU"] and (found.time, found.device_hours) == (None, None)
    assert [made.time for made in found.stages] == ["15 min", "not recorded", "not recorded"]
    with_seconds(made, {"reward-1": 0.0, "evaluate-sft": 0.0})
    assert spent({0: collect(made)}).device_hours == pytest.approx(1.0)


def test_the_strip_and_the_policy_are_on_the_page(page: Page) -> None:
    strip = " ".join(re.sub(r"<[^>]*>", " ", page.source.split('<dl class="strip">')[1].split("</dl>")[0]).split())
    assert "Finished 2026-09-21 14:13 UTC Devices 1 cpu All stages 64 min, 1.1 device hours SFT 60 min" in strip
    assert strip.endswith("Policy of mpo stages/ppo-mpo/model") and "../stages/ppo-mpo/model/" in page.all("a", "href")


def test_a_policy_without_its_weights_is_named_so(workdir: Path) -> None:
    sft, *_ = collect(workdir)
    found = provenance.policy(workdir, sft)
    assert found == {"run": "sft", "path": "stages/sft-1", "address": "../stages/sft-1/", "kept": False}


def test_the_paper_s_tables_are_last_and_folded_and_only_where_they_mean_something(tmp_path: Path, page: Page) -> None:
    assert "paper" not in page.sections and "paper, HH-RLHF" not in page.text
    config = Config(workdir="w", data={"kind": "hh", "path": ["train.jsonl"]})  # type: ignore[arg-type]
    runs = ("sft", "dpo", "mpo")
    made = workdirs.make(tmp_path, runs, configs=dict.fromkeys(runs, config))
    found = Page(write_report(made, resamples=50))
    assert found.sections[-2:] == ["claims", "paper"] and "paper, HH-RLHF" in found.text
    last = found.source.split('<section id="claims">')[1]
    outside = re.sub(r"<details>.*?</details>", "", last, flags=re.DOTALL)
    assert "<table" in last and "<table" not in outside and "Table 3: mean reward" not in outside


def test_a_table_is_compared_with_the_paper_on_any_data(workdir: Path, tmp_path: Path) -> None:
    by_seed: BySeed = {0: collect(workdir)}
    assert not provenance.is_comparable_to_paper(tmp_path, by_seed)
    assert provenance.is_comparable_to_paper(tmp_path, by_seed | {1: by_seed[0]})
    (tmp_path / provenance.TABLE_CONFIG).touch()
    assert provenance.is_comparable_to_paper(tmp_path, by_seed)


def test_contents_lead_to_every_section_in_order(page: Page) -> None:
    assert [link[1:] for link in page.all("a", "href") if link.startswith("#")][: len(page.sections)] == page.sections


def test_figures_take_their_colours_from_the_page_and_share_no_name(page: Page) -> None:
    names = [value for _, attributes in page.tags for name, value in attributes.items() if name == "id"]
    assert len(names) == len(set(names))
    drawn = " ".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    used = re.findall(r"url\(#([^)]+)\)", drawn) + re.findall(r"href=\"#([^\"]+)\"", drawn)
    assert used and set(used) <= set(names) and "<style" not in drawn
    # black, white and the greys would be lost on a dark page
    assert not re.search(r"#(000000|ffffff|555555|e4e4e4)\b", drawn) and "font-family" not in drawn
    blocks = (page.source.split(part)[1].split("}")[0] for part in (":root {", "dark) {"))
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in blocks)
    assert set(re.findall(r"var\((--\w+)\)", drawn)) <= dark == light


def test_a_figure_s_text_is_escaped() -> None:
    rows = [
        {
            "source": "<b>&",
            "low": 0.0,
            "high": 1.0,
            "count": 2,
            "share": 1.0,
            "accuracy": 0.5,
            "ci_low": 0.1,
            "ci_high": 0.9,
        }
    ]
    chart = figures.accuracy_by_gap(rows)
    assert "&lt;b&gt;&amp;" in chart.svg and "<b>" not in chart.svg
    assert chart.svg == figures.accuracy_by_gap(rows).svg


def test_a_colour_of_the_page_is_a_run_s_own_elsewhere() -> None:
    assert canvas.on_page(canvas.style("sft")["color"]) == "currentColor"
    assert canvas.on_page("#E69F00") == "#E69F00"
