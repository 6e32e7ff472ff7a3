"""Tables over seeds: a seed is one observation."""

import math
from pathlib import Path
from typing import Any

import pytest

from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError
from mpo_jax.tools.report.results import Measured, RunResult
from mpo_jax.tools.report.seeds import (
    Repeated,
    collect_seeds,
    differences,
    over_seeds,
    pair_differences,
    seed_differences,
    seed_rows,
    share_prompts,
)
from mpo_jax.types import Artifact
from tests.tools.report import workdirs


def result(run: str, **summary: float) -> RunResult:
    filled = summary | {f"{name}_se": 123.0 for name in summary}
    manifest: dict[str, Any] = {"summary": {"prompts": 5, **filled}}
    made = RunResult(run, Path("nowhere"), {"evaluate": Artifact(Path("nowhere"), manifest)})
    made.__dict__["measured"] = Measured([], [], {})  # no prompt in common: each seed has its own
    return made


def test_mean_and_error_are_over_seeds_not_over_prompts() -> None:
    by_seed = {
        0: [result("sft", score=1.0, kl=0.0), result("mpo", score=4.0, kl=2.0)],
        1: [result("sft", score=3.0, kl=0.0), result("mpo", score=4.5, kl=2.0)],
        2: [result("sft", score=8.0, kl=0.0), result("mpo", score=6.5, kl=2.0)],
    }
    sft, mpo = over_seeds(by_seed)
    # 1, 3, 8: mean 4, variance (9 + 1 + 16) / 2 = 13, error sqrt(13 / 3)
    prompts = pytest.approx(123 / math.sqrt(3))
    assert sft == {
        "run": "sft", "seeds": 3, "prompts": 15, "error_over": "seeds",
        "score": 4.0, "score_se": pytest.approx(math.sqrt(13 / 3)), "score_se_seeds": pytest.approx(math.sqrt(13 / 3)),
        "score_se_prompts": prompts, "kl": 0.0, "kl_se": 0.0, "kl_se_seeds": 0.0, "kl_se_prompts": prompts,
    }  # fmt: skip
    # 4, 4.5, 6.5: mean 5, variance (1 + 0.25 + 2.25) / 2 = 1.75
    assert mpo["score"] == 5.0
    assert mpo["score_se"] == pytest.approx(math.sqrt(1.75 / 3))


def test_a_run_that_one_seed_lacks_counts_the_seeds_it_has() -> None:
    by_seed = {0: [result("sft", score=1.0), result("dpo", score=2.0)], 7: [result("sft", score=2.0)]}
    assert [(row["run"], row["seeds"]) for row in over_seeds(by_seed)] == [("sft", 2), ("dpo", 1)]
    # one seed has no spread over seeds: its error is over prompts, and the row says so
    assert (over_seeds(by_seed)[1]["score_se"], over_seeds(by_seed)[1]["error_over"]) == (123.0, "prompts")


def test_a_column_that_one_seed_lacks_is_left_out() -> None:
    (row,) = over_seeds({0: [result("sft", score=1.0, utility=1.0)], 1: [result("sft", score=2.0)]})
    assert row["score"] == 1.5
    assert "utility" not in row


def two_seeds(folder: Path, *, shared: bool = True) -> Path:
    """Seeds 3 and 4 of SFT and DPO on three prompts, whose rewards differ by 1, 11 and 21, and utilities by 0.5."""
    for seed in (4, 3):
        prompts = ["a", "b", "c"] if shared else [f"{seed}: {name}" for name in "abc"]
        shifted = [
            {**row, "score": row["score"] + 10.0 * index} for index, row in enumerate(workdirs.samples("dpo", prompts))
        ]
        sampled = {"sft": workdirs.samples("sft", prompts), "dpo": shifted}
        workdirs.make(folder / f"seed-{seed}", ("sft", "dpo"), sampled=sampled)
    return folder


def test_seeds_are_found_in_order_and_unfinished_ones_left_out(tmp_path: Path) -> None:
    two_seeds(tmp_path)
    (tmp_path / "seed-9" / "runs").mkdir(parents=True)
    by_seed = collect_seeds(tmp_path)
    assert list(by_seed) == [3, 4]
    assert [result.name for result in by_seed[3]] == ["sft", "dpo"]


def test_a_workdir_without_seeds_is_its_own_seed(tmp_path: Path) -> None:
    config = Config(workdir="w", seed=7)
    assert list(collect_seeds(workdirs.make(tmp_path, ("sft",), configs={"sft": config}))) == [7]
    with pytest.raises(UserError, match="no finished run"):
        collect_seeds(tmp_path / "empty")


def test_rows_and_differences_a_seed(tmp_path: Path) -> None:
    by_seed = collect_seeds(two_seeds(tmp_path))
    rows = [(row["seed"], row["run"], row["score"]) for row in seed_rows(by_seed)]
    assert rows == [(3, "sft", -0.125), (3, "dpo", 1.021), (4, "sft", -0.125), (4, "dpo", 1.021)]
    score, utility = seed_differences(by_seed, resamples=20)[:2]
    # differences 1, 11, 21: mean 11, error 10 / sqrt(3)
    assert (score["seed"], score["column"], score["mean"]) == (3, "score", 11.0)
    assert score["z"] == pytest.approx(1.1 * math.sqrt(3))
    # every difference is 0.5: no spread, so no z
    assert (utility["column"], utility["mean"]) == ("utility", 0.5) and math.isnan(utility["z"])


@pytest.mark.parametrize("shared", [True, False], ids=["crossed", "nested"])
def test_the_design_is_read_from_the_prompts(tmp_path: Path, shared: bool) -> None:
    by_seed = collect_seeds(two_seeds(tmp_path, shared=shared))
    assert share_prompts(by_seed) is shared
    found = differences(by_seed, "dpo", "sft", "score")
    assert found is not None and found.shared_prompts is shared
    assert [group.tolist() for group in found.groups] == [[1.0, 11.0, 21.0]] * 2
    assert differences(by_seed, "mpo", "sft", "score") is None
    score, utility = pair_differences(by_seed, resamples=400)
    assert (score["run"], score["against"], score["mean"]) == ("dpo", "sft", 11.0)
    # equal seeds say nothing new of shared prompts, and as much again of prompts of their own
    assert score["prompts"] == (3 if shared else 6)
    assert score["se"] == pytest.approx(10 / math.sqrt(3) if shared else 10 / math.sqrt(6))
    assert score["low"] < 11 < score["high"]
    assert (utility["low"], utility["mean"], utility["high"]) == (0.5, 0.5, 0.5)


def test_shared_prompts_count_once_in_the_errors(tmp_path: Path) -> None:
    """DPO's rewards are 1.25, 12.25 and 23.25 in both seeds: seeds have no spread, prompts that of one seed."""
    # made-up summaries count 4 prompts a seed, the samples three
    for shared, prompts, error in ((True, 3, 11 / math.sqrt(3)), (False, 2 * 4, 0.0)):
        rows = over_seeds(collect_seeds(two_seeds(tmp_path / str(shared), shared=shared)))
        dpo = next(row for row in rows if row["run"] == "dpo")
        assert (dpo["prompts"], dpo["error_over"]) == (prompts, "seeds and prompts" if shared else "seeds")
        assert dpo["score_se"] == pytest.approx(error) and dpo["score_se_seeds"] == 0.0


def test_seeds_meet_in_the_prompts_that_all_of_them_have() -> None:
    found = Repeated.of([{"a": 1.0, "b": 2.0, "c": 3.0}, {"c": 6.0, "b": 5.0}])
    assert found.shared_prompts and [group.tolist() for group in found.groups] == [[2.0, 3.0], [5.0, 6.0]]
    # a prompt that seeds share by chance makes no crossed design
    apart = Repeated.of([{"a": 1.0, "b": 2.0, "c": 3.0}, {"c": 6.0, "d": 5.0, "e": 0.0}])
    assert not apart.shared_prompts and apart.num_prompts == 6


def test_a_prompt_that_comes_twice_is_paired_by_its_number() -> None:
    rows = [{"prompt": "a", "score": 1.0}, {"prompt": "a", "score": 2.0}, {"prompt": "b"}]
    assert list(Measured.of(rows).values("score").values()) == [1.0, 2.0]
