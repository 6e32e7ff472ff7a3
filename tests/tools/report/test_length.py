"""Length and repetition beside the reward, against an analysis of covariance by statsmodels."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm

from mpo_jax.config.schema import Config
from mpo_jax.evaluation.repetition import repeated
from mpo_jax.tools.report.evidence import gather, write_evidence
from mpo_jax.tools.report.length import equal_length_rows, length_rows, reward_per_token
from mpo_jax.tools.report.page import write_report
from mpo_jax.tools.report.seeds import BySeed, collect_seeds, compared_runs
from mpo_jax.tools.report.verdict_rows import Verdicts
from tests.tools.report import workdirs

PROMPTS = 80
LONGER = {"sft": 0, "ppo": 12, "mpo": 12}
BETTER = {"sft": 0.0, "ppo": 0.0, "mpo": 0.4}


def made_up(folder: Path, *, seeds: int = 1, per_token: float = 0.05, noise: float = 0.1) -> BySeed:
    """PPO's answers are longer than SFT's, MPO's as long and better; the reward likes length."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        sampled: dict[str, list[dict[str, Any]]] = {}
        for run, longer in LONGER.items():
            tokens = rng.integers(10, 40, PROMPTS) + longer
            score = per_token * tokens + BETTER[run] + noise * rng.normal(size=PROMPTS)
            sampled[run] = [
                {"prompt": f"p{n}", "response": "a b c d" if run == "sft" else "a b c a b c", "score": float(s),
                 "kl": 0.0, "length": int(t), "has_eos": True}
                for n, (t, s) in enumerate(zip(tokens, score, strict=True))
            ]  # fmt: skip
        workdirs.make(folder / f"seed-{seed}", tuple(LONGER), utility=False, sampled=sampled)
    return collect_seeds(folder)


def test_what_is_left_at_equal_length_is_an_analysis_of_covariance(tmp_path: Path) -> None:
    by_seed = made_up(tmp_path)
    runs = {result.name: result.measured for result in by_seed[0]}
    tokens = np.concatenate([runs[name].columns["length"] for name in LONGER])
    score = np.concatenate([runs[name].columns["score"] for name in LONGER])
    dummies = np.repeat(np.eye(len(LONGER)), PROMPTS, axis=0)
    fit = sm.OLS(score, np.column_stack([dummies, tokens])).fit()
    assert reward_per_token(by_seed[0]) == pytest.approx(fit.params[-1]) == pytest.approx(0.05, abs=0.005)
    means = dict(zip(LONGER, fit.params[:-1], strict=True))
    rows = {(row["run"], row["against"]): row for row in equal_length_rows(by_seed, resamples=400)}
    assert list(rows) == [("ppo", "sft"), ("mpo", "sft"), ("mpo", "ppo")]
    for (run, against), row in rows.items():
        assert row["equal_length"] == pytest.approx(means[run] - means[against])
        gains = runs[run].columns["score"] - runs[against].columns["score"]
        assert row["reward"] == pytest.approx(gains.mean())
        assert row["tokens"] == pytest.approx((runs[run].columns["length"] - runs[against].columns["length"]).mean())
    # all that PPO gains over SFT is length; what MPO gains over PPO is not
    ppo, mpo = rows["ppo", "sft"], rows["mpo", "ppo"]
    assert ppo["reward"] > 0.4 and ppo["ci_low"] < 0 < ppo["ci_high"] and abs(ppo["equal_length"]) < 0.1
    assert mpo["ci_low"] > 0.3 and mpo["ci_high"] < 0.5


def test_seeds_have_slopes_of_their_own(tmp_path: Path) -> None:
    one = made_up(tmp_path / "one")
    two = made_up(tmp_path / "two", seeds=2)
    other = {0: two[1]}
    found = [
        {(row["run"], row["against"]): row["equal_length"] for row in equal_length_rows(by_seed, resamples=40)}
        for by_seed in (one, other, two)
    ]
    for pair, mean in found[2].items():
        assert mean == pytest.approx((found[0][pair] + found[1][pair]) / 2)


def test_a_reward_that_does_not_know_length_loses_nothing(tmp_path: Path) -> None:
    by_seed = made_up(tmp_path, per_token=0.0, noise=0.0)
    for row in equal_length_rows(by_seed, resamples=40):
        assert row["equal_length"] == pytest.approx(row["reward"])
    assert [row["correlation"] for row in length_rows(by_seed)] == [None] * 3


def test_answers_of_one_length_have_no_slope(tmp_path: Path) -> None:
    prompts = ["a", "b", "c"]
    workdirs.make(tmp_path, sampled={run: workdirs.samples(run, prompts) for run in ("sft", "dpo", "mpo")})
    by_seed = collect_seeds(tmp_path)
    assert math.isnan(reward_per_token(by_seed[0]))
    assert all(row["equal_length"] == pytest.approx(row["reward"]) for row in equal_length_rows(by_seed, resamples=40))
    assert [row["length"] for row in length_rows(by_seed)] == [9.0] * 3


def test_runs_of_one_length_each_do_not_tell_what_length_gives(tmp_path: Path) -> None:
    sampled = {run: workdirs.samples(run, ["a", "b", "c"]) for run in ("sft", "dpo", "mpo")}
    for row in sampled["sft"]:
        row["length"] = 5
    workdirs.make(tmp_path, sampled=sampled)
    rows = {(row["run"], row["against"]): row for row in equal_length_rows(collect_seeds(tmp_path), resamples=40)}
    assert [rows[pair]["equal_length"] for pair in (("dpo", "sft"), ("mpo", "sft"))] == [None, None]
    assert rows["mpo", "dpo"]["equal_length"] == pytest.approx(rows["mpo", "dpo"]["reward"])


def test_every_split_is_compared_with_the_baselines(tmp_path: Path) -> None:
    runs = ("sft", "dpo_base", "dpo", "ppo", "mpo", "mpo_f0.25")
    row = {"prompt": "a", "response": "b", "score": 0.0, "length": 1}
    configs = {run: Config(workdir=str(tmp_path)) for run in runs}
    workdirs.make(tmp_path, runs, utility=False, sampled={run: [row] for run in runs}, configs=configs)
    found = compared_runs(collect_seeds(tmp_path))
    assert [pair for pair in found if pair[0] == "mpo_f0.25"] == [
        ("mpo_f0.25", "sft"), ("mpo_f0.25", "dpo"), ("mpo_f0.25", "ppo")
    ]  # fmt: skip
    assert {other for run, other in found if run == "mpo"} == {*runs} - {"mpo"} and len({*found}) == len(found)


def test_rows_a_run(tmp_path: Path) -> None:
    by_seed = made_up(tmp_path)
    rows = {row["run"]: row for row in length_rows(by_seed)}
    sft = by_seed[0][0].measured.columns
    assert rows["sft"]["correlation"] == pytest.approx(np.corrcoef(sft["length"], sft["score"])[0, 1])
    assert rows["sft"]["correlation"] > 0.9
    assert rows["sft"]["length"] == pytest.approx(sft["length"].mean())
    assert (rows["sft"]["repetition"], rows["mpo"]["repetition"]) == (0.0, 0.25)


def test_a_single_prompt_has_no_interval(tmp_path: Path) -> None:
    workdirs.make(tmp_path, ("sft", "mpo"), sampled={run: workdirs.samples(run, ["a"]) for run in ("sft", "mpo")})
    (row,) = equal_length_rows(collect_seeds(tmp_path), resamples=40)
    assert row["ci_low"] is row["ci_high"] is None and math.isfinite(row["equal_length"])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0), ("one two", 0.0), ("one two three", 0.0), ("a b c a b c", 0.25), ("no no no no no", 2 / 3),
        ("a b c d e f", 0.0), ("a  b\nc a\tb c", 0.25),
    ],
)  # fmt: skip
def test_repetition(text: str, share: float) -> None:
    assert repeated(text) == pytest.approx(share)


def test_files_and_page_show_it(tmp_path: Path) -> None:
    by_seed = made_up(tmp_path)
    write_evidence(tmp_path, gather(by_seed, Verdicts(), resamples=40), resamples=40, left_out={})
    with (tmp_path / "tables" / "equal_length.csv").open(newline="", encoding="utf-8") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["ppo", "mpo", "mpo"]
    text = (tmp_path / "tables" / "all.md").read_text(encoding="utf-8")
    assert "## Length and repetition" in text and "## Differences at equal length" in text and " 25.0% |" in text
    page = write_report(tmp_path, resamples=40).read_text(encoding="utf-8")
    assert '<section id="length">' in page and "equal length" in page
    alone = collect_seeds(workdirs.make(tmp_path / "alone", ("mpo",)))
    assert equal_length_rows(alone, resamples=40) == []
