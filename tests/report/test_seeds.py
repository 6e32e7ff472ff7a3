"""Tables over seeds: a seed is one observation."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from mpo_jax.report.results import RunResult, collect
from mpo_jax.report.seeds import over_seeds, write_seeds
from mpo_jax.types import Artifact
from tests.report import workdirs


def result(run: str, **summary: float) -> RunResult:
    filled = summary | {f"{name}_se": 123.0 for name in summary}
    manifest: dict[str, Any] = {"summary": {"prompts": 5, **filled}}
    return RunResult(run, Path("nowhere"), {"evaluate": Artifact(Path("nowhere"), manifest)})


def test_mean_and_error_are_over_seeds_not_over_prompts() -> None:
    by_seed = {
        0: [result("sft", score=1.0, kl=0.0), result("mpo", score=4.0, kl=2.0)],
        1: [result("sft", score=3.0, kl=0.0), result("mpo", score=4.5, kl=2.0)],
        2: [result("sft", score=8.0, kl=0.0), result("mpo", score=6.5, kl=2.0)],
    }
    sft, mpo = over_seeds(by_seed)
    # 1, 3, 8: mean 4, variance (9 + 1 + 16) / 2 = 13, error sqrt(13 / 3)
    assert sft == {
        "run": "sft", "seeds": 3, "score": 4.0, "score_se": pytest.approx(math.sqrt(13 / 3)), "kl": 0.0, "kl_se": 0.0,
    }  # fmt: skip
    # 4, 4.5, 6.5: mean 5, variance (1 + 0.25 + 2.25) / 2 = 1.75
    assert mpo["score"] == 5.0
    assert mpo["score_se"] == pytest.approx(math.sqrt(1.75 / 3))


def test_a_run_that_one_seed_lacks_counts_the_seeds_it_has() -> None:
    by_seed = {0: [result("sft", score=1.0), result("dpo", score=2.0)], 7: [result("sft", score=2.0)]}
    assert [(row["run"], row["seeds"]) for row in over_seeds(by_seed)] == [("sft", 2), ("dpo", 1)]
    assert over_seeds(by_seed)[1]["score_se"] == 0.0


def test_a_column_that_one_seed_lacks_is_left_out() -> None:
    (row,) = over_seeds({0: [result("sft", score=1.0, utility=1.0)], 1: [result("sft", score=2.0)]})
    assert row["score"] == 1.5
    assert "utility" not in row


def test_tables_are_written_with_a_line_a_seed(tmp_path: Path) -> None:
    prompts = ["a", "b", "c"]
    shifted = [
        {**row, "score": row["score"] + 10.0 * index} for index, row in enumerate(workdirs.samples("dpo", prompts))
    ]
    sampled = {"sft": workdirs.samples("sft", prompts), "dpo": shifted}
    by_seed = {
        seed: collect(workdirs.make(tmp_path / f"seed-{seed}", ("sft", "dpo"), sampled=sampled)) for seed in (3, 4)
    }
    paths = write_seeds(tmp_path, by_seed)
    assert paths == [tmp_path / "tables" / f"{name}.csv" for name in ("seeds", "by_seed", "differences_by_seed")]
    tables = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    seeds, each, differences = tables
    assert [(row["run"], row["seeds"], row["score"]) for row in seeds] == [
        ("sft", "2", "-0.125"),
        ("dpo", "2", "1.021"),
    ]
    assert [(row["seed"], row["run"]) for row in each] == [("3", "sft"), ("3", "dpo"), ("4", "sft"), ("4", "dpo")]
    score, utility = differences[:2]
    # differences 1, 11, 21: mean 11, error 10 / sqrt(3)
    assert (score["seed"], score["column"], float(score["mean"])) == ("3", "score", 11.0)
    assert float(score["z"]) == pytest.approx(1.1 * math.sqrt(3))
    # every difference is 0.5: no spread, so no z
    assert (utility["column"], float(utility["mean"]), utility["z"]) == ("utility", 0.5, "nan")
