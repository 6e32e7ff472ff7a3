"""Claims on made-up runs whose answers are known, the paper's tables beside them, and Markdown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mpo_jax.config.schema import Config, RewardConfig
from mpo_jax.tools.report import paper, paper_figures
from mpo_jax.tools.report.calibration import LABELLED, signed_gaps
from mpo_jax.tools.report.claims import claim_rows, claims_of, unit
from mpo_jax.tools.report.curves import stage_series
from mpo_jax.tools.report.markdown import cell, heading, markdown
from mpo_jax.tools.report.paper_tables import paper_tables
from mpo_jax.tools.report.seeds import BySeed, collect_seeds
from mpo_jax.tools.report.spent import spent
from mpo_jax.tools.report.summary import warnings
from mpo_jax.tools.report.verdict_rows import Verdicts
from tests.tools.report import workdirs

PROMPTS = 60


def made_up(
    folder: Path,
    means: dict[str, float],
    *,
    seeds: int = 3,
    configs: dict[str, Config] | None = None,
    noise: float = 1.0,
    shared: bool = False,
) -> BySeed:
    """Runs whose reward on every prompt is a mean of their own plus noise; a seed's runs share what a prompt is worth.

    Args:
      shared: all seeds have the same prompts; else each has its own.
    """
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        base = rng.normal(0, 5, PROMPTS)
        names = [f"p{i}" if shared else f"{seed}: p{i}" for i in range(PROMPTS)]
        sampled: dict[str, Any] = {
            run: [
                {"prompt": name, "response": run, "score": float(base[i] + mean + noise * rng.normal())}
                for i, name in enumerate(names)
            ]
            for run, mean in means.items()
        }
        workdirs.make(folder / f"seed-{seed}", tuple(means), utility=False, sampled=sampled, configs=configs)
    return collect_seeds(folder)


def test_verdicts_follow_signs_and_sizes(tmp_path: Path) -> None:
    by_seed = made_up(tmp_path, {"dpo_base": 2.0, "dpo": 1.0, "ppo": 3.0, "mpo": 3.0, "mpo_reverse": 1.0})
    verdicts = {row["claim"]: row["verdict"] for row in claim_rows(by_seed, resamples=500)}
    assert verdicts == {
        "DPO better than DPO-base": "contradicted",
        "PPO better than DPO": "supported",
        "MPO better than DPO": "supported",
        "MPO better than PPO": "undecided",
        "reverse worse than PPO": "supported",
    }


def test_numbers_are_those_of_the_paired_differences(tmp_path: Path) -> None:
    """One seed: the interval and p are those of a t-test on the differences, to the bootstrap's accuracy."""
    by_seed = made_up(tmp_path, {"ppo": 0.0, "mpo": 0.35}, seeds=1)
    (row,) = claim_rows(by_seed, resamples=20000)
    values = [{s["prompt"]: s["score"] for s in result.samples()} for result in by_seed[0]]
    difference = np.asarray([values[1][p] - values[0][p] for p in values[0]])
    test = stats.ttest_1samp(difference, 0.0)
    interval = test.confidence_interval()
    assert (row["better"], row["worse"], row["seeds"], row["prompts"]) == ("mpo", "ppo", 1, PROMPTS)
    assert row["difference"] == pytest.approx(difference.mean())
    width = interval.high - interval.low
    np.testing.assert_allclose([row["ci_low"], row["ci_high"]], interval, atol=0.06 * width)
    assert row["p"] == pytest.approx(test.pvalue, abs=0.03)
    assert row["p_holm"] == row["p"], "one claim needs no correction"


def test_p_values_are_corrected_within_their_measure(tmp_path: Path) -> None:
    by_seed = made_up(tmp_path, {"dpo_base": 0.0, "dpo": 0.2, "ppo": 0.3, "mpo": 0.35}, seeds=2)
    rows = claim_rows(by_seed, resamples=400)
    assert len(rows) == 4
    np.testing.assert_allclose(
        [row["p_holm"] for row in rows], multipletests([row["p"] for row in rows], method="holm")[1]
    )


def test_a_seed_that_lacks_a_run_is_left_out_of_its_claims(tmp_path: Path) -> None:
    by_seed = made_up(tmp_path, {"ppo": 0.0, "mpo": 1.0})
    by_seed[1] = by_seed[1][:1]
    (row,) = claim_rows(by_seed, resamples=100)
    assert (row["seeds"], row["prompts"]) == (2, 2 * PROMPTS)


def splits(**selects: dict[str, Any]) -> dict[str, Config]:
    return {run: Config(workdir="w", select=select) for run, select in selects.items()}  # type: ignore[arg-type]


def test_thresholds_are_compared_with_their_neighbours(tmp_path: Path) -> None:
    configs = splits(mpo={"threshold": 1.0}, mpo_t2={"threshold": 2.0}, mpo_t0={"threshold": 0.0})
    by_seed = made_up(tmp_path, {"mpo": 1.0, "mpo_t0": 1.0, "mpo_t2": 1.0}, seeds=1, configs=configs)
    claims = {claim.text: (claim.better, claim.worse, claim.paper) for claim in claims_of(by_seed)}
    assert claims == {
        "MPO(0) better than MPO(1)": ("mpo_t0", "mpo", paper.NOTHING),
        # Table 3: 2.801 - 2.22 and 3.784 - 3.569
        "MPO(1) better than MPO(2)": ("mpo", "mpo_t2", paper.Reported(0.581, 0.215)),
    }


def test_a_larger_share_of_easy_pairs_is_a_lower_threshold(tmp_path: Path) -> None:
    half, quarter = ({"threshold": None, "easy_fraction": share} for share in (0.5, 0.25))
    configs = splits(mpo=half, **{"mpo_f0.25": quarter, "mpo_t1": {"threshold": 1.0}})
    by_seed = made_up(tmp_path, {"mpo": 1.0, "mpo_f0.25": 1.0, "mpo_t1": 1.0}, seeds=1, configs=configs)
    (claim,) = claims_of(by_seed)
    assert (claim.text, claim.better, claim.worse) == ("MPO(50% easy) better than MPO(25% easy)", "mpo", "mpo_f0.25")


def test_every_claim_of_the_paper_has_the_sign_of_its_numbers_somewhere() -> None:
    """On one of the two data sets at least: on TL;DR the paper's own DPO is below DPO-base."""
    assert paper.CLAIMS[0].paper == paper.Reported(0.36, -0.095)
    for claim in paper.CLAIMS:
        numbers = [number for number in (claim.paper.hh, claim.paper.tldr) if number is not None]
        assert not numbers or max(numbers) > 0, claim.text


@pytest.mark.parametrize(("shared", "word"), [(True, "crossed"), (False, "nested")])
def test_what_is_resampled_is_said(tmp_path: Path, shared: bool, word: str) -> None:
    by_seed = made_up(tmp_path, {"sft": 0.0}, seeds=2, shared=shared)
    assert unit(by_seed).startswith("2 seeds") and word in unit(by_seed)
    # crossed intervals hold as they should, by the simulations that `paired_bootstrap` names
    assert ("What 2 seeds cannot tell is how much seeds differ" in unit(by_seed)) != shared
    assert unit({0: by_seed[0]}).startswith("One seed: only prompts are resampled")
    assert "cannot tell" not in unit({seed: by_seed[0] for seed in range(5)})


def test_models_that_all_seeds_share_are_said(tmp_path: Path) -> None:
    for name, shared in (("own", False), ("shared", True)):
        for seed in (0, 1):
            workdirs.make(tmp_path / name / f"seed-{seed}", ("sft", "dpo"), shared=shared)
    assert "share one" not in unit(collect_seeds(tmp_path / "own"))
    both = unit(collect_seeds(tmp_path / "shared"))
    assert "All seeds share one SFT model and one reward model" in both
    finished = Config(workdir="w", reward=RewardConfig(path="some/reward"))
    for seed in (0, 1):
        folder = tmp_path / "finished" / f"seed-{seed}"
        workdirs.make(folder, ("sft", "dpo"), configs=dict.fromkeys(("sft", "dpo"), finished))
    assert "All seeds share one reward model: what" in unit(collect_seeds(tmp_path / "finished"))


def test_a_model_that_seeds_share_counts_once(tmp_path: Path) -> None:
    found: dict[bool, Any] = {}
    for shared in (False, True):
        for seed in (0, 1):
            made = workdirs.make(tmp_path / str(shared) / f"seed-{seed}", ("sft", "dpo"), metrics=True, shared=shared)
            for manifest in made.glob("stages/*/manifest.json"):
                manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seconds": 60.0, "warnings": ["w"]}))
        found[shared] = collect_seeds(tmp_path / str(shared))
    models = {shared: 1 if shared else 2 for shared in found}
    for shared, by_seed in found.items():
        tables = {table.name: table.rows for table in paper_tables(by_seed, Verdicts())}
        accuracy = tables["table2"][0]
        assert accuracy["pairs"] == 10 * models[shared]
        assert accuracy["seeds"] == models[shared] and (accuracy["se_seeds_accuracy"] is None) == shared
        gaps = {row["low"]: row["count"] for row in tables["figure2"] if row["pairs"].endswith("labels")}
        assert gaps == {low: count * models[shared] for low, count in {0.0: 8, 0.5: 2}.items()}
        assert len(signed_gaps(by_seed)[LABELLED]) == 3 * models[shared]
        minutes = {made.stage: made.seconds for made in spent(by_seed).stages}
        assert minutes == {
            "SFT": 60 * models[shared], "Reward model": 60 * models[shared], "DPO": 120, "Evaluation": 240,
        }  # fmt: skip
        (curve,) = stage_series(by_seed, "sft")
        assert len(curve.seeds) == models[shared]
        assert sum(line.startswith("sft of ") for line in warnings(by_seed)) == models[shared]


def test_shared_prompts_make_a_claim_no_surer_by_more_seeds(tmp_path: Path) -> None:
    """The same small difference on the same prompts in every seed, as shared prompts make it: seeds add nothing."""
    rng = np.random.default_rng(1)
    difference = rng.normal(0.2, 1.0, PROMPTS)
    widths = {}
    for shared in (True, False):
        for seed in range(5):
            names = [f"p{i}" if shared else f"{seed}: p{i}" for i in range(PROMPTS)]
            sampled: dict[str, Any] = {
                run: [{"prompt": name, "response": "r", "score": float(x)} for name, x in zip(names, xs, strict=True)]
                for run, xs in (("ppo", np.zeros(PROMPTS)), ("mpo", difference))
            }
            folder = tmp_path / str(shared) / f"seed-{seed}"
            workdirs.make(folder, ("ppo", "mpo"), utility=False, sampled=sampled)
        (row,) = claim_rows(collect_seeds(tmp_path / str(shared)), resamples=2000)
        widths[shared] = row["ci_high"] - row["ci_low"]
    assert widths[True] == pytest.approx(np.sqrt(5) * widths[False], rel=0.1)


def test_claims_are_tested_at_every_split(tmp_path: Path) -> None:
    one, two = {"threshold": 1.0}, {"threshold": 2.0}
    means = {"dpo": 1.0, "ppo": 3.0, "mpo": 4.0, "mpo_t2": 2.0, "mpo_reverse": 2.0, "mpo_reverse_sft": 1.0}
    means |= {"dpo_easy": 2.0, "dpo_easy_t2": 0.0, "dpo_hard": 1.0, "dpo_hard_t2": 1.0}
    means |= {"ppo_easy": 2.0, "ppo_easy_t2": 2.0, "ppo_hard": 1.0}
    configs = splits(**{name: two if name.endswith("_t2") else one for name in means})
    by_seed = made_up(tmp_path, means, seeds=1, configs=configs)
    found = {row["claim"]: (row["better"], row["worse"], row["paper_hh"]) for row in claim_rows(by_seed, resamples=50)}
    assert found == {
        "PPO better than DPO": ("ppo", "dpo", 0.654),
        # 2.801 and 2.22 less 1.859, then less 2.513
        "MPO better than DPO, threshold 1": ("mpo", "dpo", 0.942),
        "MPO better than DPO, threshold 2": ("mpo_t2", "dpo", 0.361),
        "MPO better than PPO, threshold 1": ("mpo", "ppo", 0.288),
        "MPO better than PPO, threshold 2": ("mpo_t2", "ppo", -0.293),
        "reverse worse than PPO": ("ppo", "mpo_reverse", 0.193),
        "reverse better than reverse-sft": ("mpo_reverse", "mpo_reverse_sft", 0.44),
        "DPO on the easy pairs better than on all, threshold 1": ("dpo_easy", "dpo", 0.048),
        "DPO on the easy pairs better than on all, threshold 2": ("dpo_easy_t2", "dpo", 0.048),
        "DPO on the easy pairs better than on the hard, threshold 1": ("dpo_easy", "dpo_hard", None),
        "DPO on the easy pairs better than on the hard, threshold 2": ("dpo_easy_t2", "dpo_hard_t2", None),
        "PPO on all prompts better than on the easy, threshold 1": ("ppo", "ppo_easy", None),
        "PPO on all prompts better than on the easy, threshold 2": ("ppo", "ppo_easy_t2", None),
        # at threshold 2 there is no run on the hard prompts
        "PPO on the easy prompts better than on the hard": ("ppo_easy", "ppo_hard", None),
        "MPO(1) better than MPO(2)": ("mpo", "mpo_t2", 0.581),
    }
    figure = next(table for table in paper_tables(by_seed, Verdicts()) if table.name == "figure4")
    assert [(row["run"], row["subset"], row["split"]) for row in figure.rows] == [
        ("dpo_easy", "easy", "threshold 1"), ("dpo_easy_t2", "easy", "threshold 2"),
        ("dpo_hard", "hard", "threshold 1"), ("dpo_hard_t2", "hard", "threshold 2"), ("dpo", "all", None),
        ("ppo_easy", "easy", "threshold 1"), ("ppo_easy_t2", "easy", "threshold 2"),
        ("ppo_hard", "hard", "threshold 1"), ("ppo", "all", None),
    ]  # fmt: skip
    assert paper.CONTRADICTION in figure.note
    chart = paper_figures.subsets(figure.rows, "reward")
    assert chart is not None and len(chart.rows) == 9


def test_the_paper_s_numbers_stand_beside_ours(tmp_path: Path) -> None:
    configs = splits(mpo={"threshold": 2.0})
    runs = {"sft": 0.0, "dpo": 1.0, "ppo": 2.0, "mpo": 3.0, "mpo_sft_kl": 2.5, "dpo_easy": 1.5}
    tables = {table.name: table.rows for table in paper_tables(made_up(tmp_path, runs, configs=configs), Verdicts())}
    assert list(tables) == ["table1", "table2", "figure2", "table3", "table4", "table5", "table6", "figure4"]
    three = {row["run"]: (row["paper_hh"], row["paper_tldr"]) for row in tables["table3"]}
    # MPO's own threshold is 2 here, so Table 3's number is that of MPO(2)
    assert three == {"sft": (0.938, 1.108), "dpo": (1.859, 2.816), "ppo": (2.513, 3.46), "mpo": (2.22, 3.569)}
    assert tables["table3"][-1]["label"] == "MPO, threshold 2"
    assert {row["run"]: row["paper_hh"] for row in tables["table6"]} == {"mpo": 2.8, "ppo": 2.513, "mpo_sft_kl": 1.915}
    assert [(row["subset"], row["paper_hh"]) for row in tables["figure4"] if row["algorithm"] == "DPO"] == [
        ("easy", 1.907), ("all", 1.859),
    ]  # fmt: skip
    ours = [row for row in tables["table4"] if row["of"] == "ours"]
    assert [row["judge"] for row in ours] == ["own reward model"]
    # MPO's reward is higher by 1 on average, with noise of sqrt(2): wins Phi(1 / sqrt 2) of the prompts
    assert ours[0]["win"] == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.1) and ours[0]["tie"] == 0
    assert tables["table5"][-1] == {"of": "ours", "win": None}


def test_markdown_has_a_column_for_what_any_row_has() -> None:
    rows = [{"run": "a|b", "x": 0.5, "none": None}, {"run": "c", "x": None, "accuracy": 0.25, "n": 12}]
    assert markdown(rows).splitlines() == [
        "| run  |     x | accuracy |   n |",
        "| ---- | ----: | -------: | --: |",
        "| a\\|b | 0.500 |          |     |",
        "| c    |       |    25.0% |  12 |",
    ]


def test_cells_and_headings() -> None:
    assert [cell("threshold", 2.0), cell("p_holm", 0.00123), cell("pareto", True), cell("easy_accuracy", 0.123)] == [
        "2", "0.0012", "yes", "12.3%",
    ]  # fmt: skip
    assert heading("score_se_prompts") == "reward s.e. (prompts)"
    assert heading("paper_hh_accuracy") == heading("paper_hh") == "paper, HH-RLHF"
