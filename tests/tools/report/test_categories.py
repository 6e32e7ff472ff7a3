"""Tables by category: only that category's prompts and pairs, the largest on the page, and nothing made up of few."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_jax.evaluation.calibration import HELD_OUT, read_gap_categories
from mpo_jax.runtime.console import console
from mpo_jax.tools.human.sheets import make_study
from mpo_jax.tools.report import categories
from mpo_jax.tools.report.categories import category_rows, category_tables, largest, names
from mpo_jax.tools.report.page import write_report
from mpo_jax.tools.report.seeds import BySeed, Rows, collect_seeds
from mpo_jax.tools.report.terminal import print_categories, print_cautions
from mpo_jax.tools.sides import compared
from tests.tools.report import workdirs

GAPS = {"helpful": [0.5, 0.0, -1.0], "harmless": [2.0]}


def make(folder: Path, sizes: dict[str, int], runs: dict[str, float], *, seeds: int = 1, gaps: bool = True) -> BySeed:
    """Runs whose reward is their own number, in `harmless` the negative, plus noise; category by category."""
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        sampled: dict[str, list[dict[str, Any]]] = {run: [] for run in runs}
        for category, size in sizes.items():
            for number in range(size):
                for run, mean in runs.items():
                    score = (-mean if category == "harmless" else mean) + 0.1 * rng.normal()
                    row = {"prompt": f"{category} {number}", "response": f" {run}", "score": score, "kl": 0.0}
                    sampled[run].append(row | {"length": number, "has_eos": True, "category": category})
        made = workdirs.make(folder / f"seed-{seed}", tuple(runs), utility=False, sampled=sampled)
        if gaps:
            rows = [(gap, name) for name, part in GAPS.items() for gap in part]
            columns = {"gap": [gap for gap, _ in rows], "category": [name for _, name in rows]}
            pq.write_table(pa.table(columns), made / "runs" / next(iter(runs)) / "reward" / HELD_OUT)
    return collect_seeds(folder)


def tables_of(by_seed: BySeed) -> dict[str, Rows]:
    return {table.name: table.rows for table in category_tables(by_seed, resamples=200)}


def test_every_table_has_one_by_category(tmp_path: Path) -> None:
    by_seed = make(tmp_path, {"helpful": 40, "harmless": 30}, {"sft": 0.0, "ppo": 1.0, "mpo": 2.0, "dpo": 0.5}, seeds=2)
    tables = tables_of(by_seed)
    assert names(by_seed) == ["helpful", "harmless"]
    assert list(tables) == [
        f"{name}_by_category"
        for name in ("seeds", "claims", "differences", "table4", "table2", "figure2", "table3", "table6", "figure4")
    ]
    main = {(row["category"], row["run"]): row for row in tables["seeds_by_category"]}
    assert main["helpful", "mpo"]["score"] == pytest.approx(2, abs=0.1)
    assert main["harmless", "mpo"]["score"] == pytest.approx(-2, abs=0.1)
    assert main["harmless", "mpo"]["prompts"] == 30 and main["helpful", "mpo"]["length"] == 19.5
    verdicts = {(row["category"], row["claim"]): row["verdict"] for row in tables["claims_by_category"]}
    assert verdicts["helpful", "MPO better than PPO"] == "supported"
    assert verdicts["harmless", "MPO better than PPO"] == "contradicted"
    wins = {row["category"]: row["win"] for row in tables["table4_by_category"]}
    assert wins == {"helpful": 1.0, "harmless": 0.0}
    # the held-out pairs of a category: one and a tie of three, and one of one, are ordered right, in each of two seeds
    accuracy = {row["category"]: (row["accuracy"], row["pairs"]) for row in tables["table2_by_category"]}
    assert accuracy == {"helpful": (0.5, 6), "harmless": (1.0, 2)}
    bins = [(row["low"], row["count"]) for row in tables["figure2_by_category"] if row["category"] == "harmless"]
    assert [(low, count) for low, count in bins if count] == [(2.0, 2)]


def test_each_category_is_a_family_of_its_own_to_holm(tmp_path: Path) -> None:
    by_seed = make(tmp_path, {"helpful": 40, "harmless": 30}, {"ppo": 1.0, "mpo": 2.0})
    for row in tables_of(by_seed)["claims_by_category"]:
        assert row["p_holm"] == row["p"], "one claim a category needs no correction"
    note = next(t.note for t in category_tables(by_seed, resamples=50) if t.name == "claims_by_category")
    assert "family of its own" in note and "exploration" in note


def test_a_handful_of_prompts_has_no_verdict_and_one_has_no_error(tmp_path: Path) -> None:
    by_seed = make(tmp_path, {"helpful": 40, "few": 3, "one": 1}, {"ppo": 1.0, "mpo": 2.0}, gaps=False)
    tables = tables_of(by_seed)
    claims = {row["category"]: row for row in tables["claims_by_category"]}
    assert claims["helpful"]["verdict"] == "supported"
    for name in ("few", "one"):
        row = claims[name]
        assert (row["verdict"], row["p"], row["ci_low"]) == ("too few prompts", None, None)
        assert row["difference"] == pytest.approx(1.0, abs=0.3)
    errors = {row["category"]: row["score_se"] for row in tables["seeds_by_category"]}
    assert errors["one"] is None and errors["few"] > 0
    assert "table2_by_category" not in tables, "no pair names a category"


def test_rows_without_categories_or_with_a_single_one_make_no_tables(tmp_path: Path) -> None:
    assert tables_of(make(tmp_path / "a", {"helpful": 4}, {"ppo": 1.0, "mpo": 2.0}, gaps=False)) == {}
    workdirs.make(tmp_path / "b", ("sft", "mpo"))
    by_seed = collect_seeds(tmp_path / "b")
    assert read_gap_categories(by_seed[0][0].artifacts["reward"].path) is None
    assert tables_of(by_seed) == {} and category_rows(by_seed) == []


def test_files_hold_all_categories_and_page_and_terminal_the_largest(tmp_path: Path) -> None:
    sizes = {f"r/{number}": 2 + number for number in range(12)}
    by_seed = make(tmp_path, sizes, {"sft": 0.0, "mpo": 1.0})
    page = write_report(tmp_path, resamples=40).read_text(encoding="utf-8")
    with (tmp_path / "report" / "tables" / "seeds_by_category.csv").open(newline="", encoding="utf-8") as file:
        assert {row["category"] for row in csv.DictReader(file)} == set(sizes)
    section = page.split('<section id="categories">')[1].split("</section>")[0]
    assert "r/11" in section and "r/4" in section and "r/3" not in section
    with console.capture() as captured:
        print_categories(by_seed)
    shown = captured.get()
    assert "r/11" in shown and "r/4" in shown and "r/3" not in shown


def test_the_largest_categories_are_those_of_most_rows_and_the_paper_s_stay(monkeypatch) -> None:
    monkeypatch.setattr(categories, "SHOWN", 1)
    rows: Rows = [{"category": "a", "items": 1}, {"category": "b", "items": 5}, {"category": None}, {"x": 1}]
    rows.append({"category": "helpful", "of": "paper"})
    assert largest(rows) == rows[1:]


def test_a_study_of_runs_draws_from_each_category(tmp_path: Path) -> None:
    make(tmp_path / "w", {"helpful": 6, "harmless": 5}, {"ppo": 1.0, "mpo": 2.0})
    runs = tmp_path / "w" / "seed-0" / "runs"
    sides = str(runs / "mpo"), str(runs / "ppo")
    pairs = compared(*sides, None, out=tmp_path / "study", overrides=())
    items = make_study(pairs, sides, n=3, by="category", seed=0).items
    assert sorted(str(item.category) for item in items) == ["harmless"] * 3 + ["helpful"] * 3


def test_warnings_of_stages_are_said_once_with_stage_and_seed(tmp_path: Path) -> None:
    warning = "12 updates [are] few"
    for seed in (0, 1):
        made = workdirs.make(tmp_path / f"seed-{seed}", ("sft", "dpo", "mpo"))
        for stage in ("sft-1.1",) if seed else ("sft-1", "dpo-mpo"):
            path = made / "stages" / stage / "manifest.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": [warning]}))
    expected = [
        f"sft of sft, dpo, mpo, seed 0: {warning}",
        f"dpo of mpo, seed 0: {warning}",
        f"sft of sft, dpo, mpo, seed 1: {warning}",
    ]
    with console.capture() as captured:
        print_cautions(collect_seeds(tmp_path))
    assert captured.get().splitlines() == [f"caution: {line}" for line in expected]
    page = write_report(tmp_path, resamples=40).read_text(encoding="utf-8")
    assert [page.count(f"<p>{line}</p>") for line in expected] == [1, 1, 1]
