"""The report's tables about the reward model: the splits that runs used stand among the usual thresholds."""

from pathlib import Path

from mpo_jax.config.schema import Config
from mpo_jax.stages.select import THRESHOLDS
from mpo_jax.tools.report.calibration import signed_gaps, threshold_rows, used_thresholds
from mpo_jax.tools.report.seeds import collect_seeds
from tests.tools.report import workdirs


def test_splits_are_named_at_the_gaps_where_they_are(tmp_path: Path) -> None:
    """Gaps of sampled pairs are 0, 0.5, 1, 1.5 and 2, so 40% of them are above 1; held out: 0.5, -0.5, 2, twice."""
    for seed in (0, 1):
        configs = {
            run: Config.model_validate({"workdir": str(tmp_path), "seed": seed, "select": select})
            for run, select in {
                "sft": {"threshold": 1.75},
                "mpo": {"threshold": None, "easy_fraction": 0.4},
                "mpo_t0.25": {"threshold": 0.25},
            }.items()
        }
        sampled = {run: [{"prompt": "p", "response": "r", "score": 0.5}] for run in configs}
        workdirs.make(
            tmp_path / f"seed-{seed}", tuple(configs), configs=configs, utility=False, select=True, sampled=sampled
        )
    by_seed = collect_seeds(tmp_path)
    used = used_thresholds(by_seed)
    assert used == {1.0: ["40% easy, seed 0", "40% easy, seed 1"], 0.25: ["threshold 0.25"]}
    rows = {row["threshold"]: row for row in threshold_rows(signed_gaps(by_seed), used)}
    assert [*rows] == sorted({*THRESHOLDS, 0.25})
    assert rows[1.0]["split"] == "40% easy, seed 0; 40% easy, seed 1" and rows[2.0]["split"] is None
    assert (rows[1.0]["easy"], rows[1.0]["hard"], rows[1.0]["easy_accuracy"]) == (2, 4, 1.0)
    assert used_thresholds({0: by_seed[0]})[1.0] == ["40% easy"]
