"""The toy world is learnt: against the known utility, with fewer steps than the quickstart has."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mpo_jax.data.pair_table import PairTable
from mpo_jax.tools.report import results
from mpo_jax.tools.report.seeds import pair_differences
from tests.pipeline.test_pipeline import manifest, mpo

pytestmark = [pytest.mark.thorough, pytest.mark.optimised]

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
FEWER = (
    "sft.train.steps=1000", "reward.train.steps=250", "select.num_prompts=1500", "ppo.train.steps=40",
    "data.toy.num_demonstrations=20000", "data.toy.num_pairs=8000", "experiment=sft,mpo",
    f"runtime.compilation_cache={jax.config.jax_compilation_cache_dir}",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    assert mpo("run", CONFIG, f"workdir={folder}", *FEWER) == 0
    return folder


def test_mpo_is_better_than_sft_by_more_than_three_standard_errors(workdir):
    """By the true utility, which no model has seen; paired by prompt."""
    rows = pair_differences({0: results.collect(workdir)}, resamples=100)
    (truth,) = [row for row in rows if (row["run"], row["against"], row["column"]) == ("mpo", "sft", "utility")]
    assert truth["mean"] > 3 * truth["se"] > 0


def test_the_reward_model_knows_more_than_its_noisy_labels(workdir):
    """Held out, and agreeing with the truth more often than the labels that it is judged by allow."""
    summary = manifest(workdir, "mpo", "reward")["summary"]
    assert 0.65 < summary["held_out_accuracy"] < 0.85
    assert summary["true_accuracy"] > summary["held_out_accuracy"] + 0.03
    by_gap = [b["accuracy"] for b in summary["true_accuracy_by_gap"] if b["count"] > 30]
    assert by_gap[-1] > by_gap[0] + 0.1, "accuracy must rise with the gap (Figure 2 of the paper)"


def test_easy_pairs_are_labelled_better_than_hard_ones(workdir):
    table = PairTable.read(workdir / "runs/mpo/select")
    easy = table.gap > 1.0
    easy_accuracy, hard_accuracy = (table.label_accuracy(np.flatnonzero(rows)) for rows in (easy, ~easy))
    assert easy_accuracy > 0.8 and easy_accuracy > hard_accuracy + 0.1
