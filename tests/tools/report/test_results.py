"""Rows from finished runs: which runs, which numbers, and differences paired by prompt."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mpo_jax.errors import UserError
from mpo_jax.tools.report import page
from mpo_jax.tools.report.results import RunResult, collect, main_rows, write_csv
from mpo_jax.tools.report.seeds import pair_differences
from mpo_jax.tools.report.terminal import runs_table
from mpo_jax.types import Artifact
from tests.tools.report import workdirs


def rows_of(values: dict[str, float], column: str = "score") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "response": "r", column: value} for prompt, value in values.items()]


def test_collect_finds_runs_in_the_order_of_the_experiments(tmp_path: Path) -> None:
    workdirs.make(tmp_path, ("mpo", "sft", "dpo"))
    assert [result.name for result in collect(tmp_path)] == ["sft", "dpo", "mpo"]
    assert [result.name for result in collect(tmp_path, ("mpo", "sft"))] == ["sft", "mpo"]


def test_collect_opens_every_artifact_by_role(tmp_path: Path) -> None:
    (mpo,) = collect(workdirs.make(tmp_path, ("mpo",), select=True))
    ids = {role: artifact.id for role, artifact in mpo.artifacts.items()}
    assert ids == {
        "sft": "sft-1", "reward": "reward-1", "select": "select-1", "1-dpo": "dpo-mpo", "2-ppo": "ppo-mpo",
        "evaluate": "evaluate-mpo",
    }  # fmt: skip
    assert mpo.artifacts["evaluate"].path == (tmp_path / "stages" / "evaluate-mpo").resolve()
    assert mpo.summary["score"] == 1.347


def test_collect_leaves_out_a_run_that_has_no_evaluation_yet(tmp_path: Path) -> None:
    workdirs.make(tmp_path, ("sft", "dpo"))
    (tmp_path / "runs" / "dpo" / "evaluate").unlink()
    assert [result.name for result in collect(tmp_path)] == ["sft"]


@pytest.mark.parametrize("names", [None, ("mpo",)])
def test_collect_says_what_to_do_where_nothing_is_finished(tmp_path: Path, names: tuple[str, ...] | None) -> None:
    if names:
        workdirs.make(tmp_path, ("sft",))
    with pytest.raises(UserError, match=r"no finished run in .*mpo run CONFIG workdir="):
        collect(tmp_path, names)


def test_main_rows_hold_the_summaries_numbers(tmp_path: Path) -> None:
    rows = main_rows(collect(workdirs.make(tmp_path)))
    assert rows == [{"run": run, "prompts": 4, **numbers} for run, numbers in workdirs.SUMMARIES.items()]


def test_main_rows_without_truth_have_no_utility(tmp_path: Path) -> None:
    rows = main_rows(collect(workdirs.make(tmp_path, utility=False)))
    assert all("utility" not in row and "utility_se" not in row for row in rows)
    assert [row["score"] for row in rows] == [-0.125, 1.021, 1.347]


def test_differences_are_paired_by_prompt_not_by_row(tmp_path: Path) -> None:
    sampled = {
        "sft": rows_of({"a": 0.0, "b": 10.0, "c": 20.0, "only sft": 99.0}),
        "dpo": rows_of({"only dpo": -99.0, "c": 21.0, "b": 11.0, "a": 1.0}),
    }
    (row,) = pair_differences({0: collect(workdirs.make(tmp_path, ("sft", "dpo"), sampled=sampled))}, resamples=50)
    # each difference is exactly 1, so there is no spread; by row it would be large
    expected = {"run": "dpo", "against": "sft", "column": "score", "prompts": 3, "mean": 1.0, "se": 0.0}
    assert row == {**expected, "low": 1.0, "high": 1.0}


def test_difference_has_mean_error_and_interval_of_the_differences(tmp_path: Path) -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, 400)
    prompts = [str(index) for index in range(400)]
    # what the runs share, of whatever size, leaves the difference
    base = np.linspace(-50, 50, 400)
    sampled = {
        "sft": rows_of(dict(zip(prompts, base.tolist(), strict=True))),
        "dpo": rows_of(dict(zip(prompts, (base + d).tolist(), strict=True))),
    }
    (row,) = pair_differences({0: collect(workdirs.make(tmp_path, ("sft", "dpo"), sampled=sampled))}, resamples=2000)
    se = d.std(ddof=1) / math.sqrt(400)
    assert row["mean"] == pytest.approx(d.mean(), abs=1e-9)
    assert row["se"] == pytest.approx(se, rel=1e-9)
    # percentiles of 2000 resamples are within a few percent of the normal interval at n = 400
    assert row["low"] == pytest.approx(d.mean() - 1.96 * se, abs=0.15 * se)
    assert row["high"] == pytest.approx(d.mean() + 1.96 * se, abs=0.15 * se)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (("sft", "dpo", "mpo"), [("dpo", "sft"), ("mpo", "sft"), ("mpo", "dpo")]),
        (("dpo", "mpo"), [("mpo", "dpo")]),
        (("sft", "dpo"), [("dpo", "sft")]),
        (("mpo",), []),
        (("sft",), []),
    ],
)
def test_every_run_against_sft_and_mpo_against_the_others(
    tmp_path: Path, runs: tuple[str, ...], expected: list[tuple[str, str]]
) -> None:
    rows = pair_differences({0: collect(workdirs.make(tmp_path, runs))}, resamples=20)
    assert [(row["run"], row["against"]) for row in rows if row["column"] == "score"] == expected
    assert [(row["run"], row["against"]) for row in rows if row["column"] == "utility"] == expected


def test_differences_leave_out_columns_and_runs_that_share_nothing(tmp_path: Path) -> None:
    sampled = {"sft": rows_of({"a": 0.0}), "dpo": rows_of({"b": 0.0}), "mpo": rows_of({"a": 5.0})}
    rows = pair_differences({0: collect(workdirs.make(tmp_path, sampled=sampled))}, resamples=20)
    assert [(row["run"], row["against"], row["column"], row["mean"]) for row in rows] == [("mpo", "sft", "score", 5.0)]


def test_csv_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    write_csv(path, [{"run": "a", "x": 0.1}, {"run": 'b, "quoted"', "y": 1e-17}])
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"run": "a", "x": "0.1", "y": ""}, {"run": 'b, "quoted"', "x": "", "y": "1e-17"}]


def test_terminal_table_shows_means_with_errors_and_a_dash_for_what_is_not_there() -> None:
    rows = [
        {"run": "sft", "score": -0.125, "score_se": 0.011, "has_eos": 0.9, "has_eos_se": 0.0},
        {"run": "mpo", "score": 1.3466, "score_se": 0.5, "utility": 3.0, "utility_se": 0.25},
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(runs_table(rows, "title"))
    lines = captured.get().splitlines()
    (sft,), (mpo,) = ([line for line in lines if name in line] for name in ("sft", "mpo"))
    assert [cell.strip() for cell in sft.strip("│").split("│")] == ["sft", "-0.125 ± 0.011", "-", "90.0%"]
    assert [cell.strip() for cell in mpo.strip("│").split("│")] == ["mpo", "1.347 ± 0.500", "3.000 ± 0.250", "-"]


def test_a_single_prompt_has_no_error() -> None:
    """0.000 would say that the mean is known."""
    numbers = {"score": 0.5, "score_se": 0.0, "has_eos": 1.0, "has_eos_se": 0.0}

    def row(prompts: int) -> dict[str, Any]:
        manifest = {"stage": "evaluate", "summary": {"prompts": prompts, **numbers}}
        return main_rows([RunResult("sft", Path("nowhere"), {"evaluate": Artifact(Path("nowhere"), manifest)})])[0]

    assert row(1)["score_se"] is None and row(1)["has_eos_se"] is None and row(2)["score_se"] == 0.0
    assert [page._cell(row(1), column) for column in ("score", "has_eos")] == ["0.500", "100.0%"]


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    cells = ["=1+1", "+a", "-a", "@a", " =1", "a=1", "-0.5", "+1e3", "it's"]
    write_csv(tmp_path / "a.csv", [{"prompt": cell, "score": -1.5} for cell in cells])
    with (tmp_path / "a.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["prompt"] for row in found] == ["'=1+1", "'+a", "'-a", "'@a", "' =1", "a=1", "-0.5", "+1e3", "it's"]
    assert {row["score"] for row in found} == {"-1.5"}
