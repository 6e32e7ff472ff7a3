"""The report's selections: each split of the pairs that runs use."""

from typing import Any

from mpo_jax.data.pair_table import FILE, PairTable
from mpo_jax.stages.select import describe
from mpo_jax.tools.report import figures
from mpo_jax.tools.report.curves import distinct
from mpo_jax.tools.report.results import RunResult
from mpo_jax.tools.report.shown import Shown


def selections(shown: Shown, results: list[RunResult]) -> list[dict[str, Any]]:
    """Each split that the runs use: the histogram of gaps, and the sizes by threshold."""
    configs = {result.name: result.config for result in results}
    found = []
    for artifact, runs in distinct(results, "select"):
        if not (artifact.path / FILE).is_file():
            continue
        table = PairTable.read(artifact.path)
        # a threshold is no part of the artifact: runs that share the pairs may split them at different places
        splits: dict[float, list[str]] = {}
        for run in runs:
            splits.setdefault(table.threshold(configs[run].select), []).append(run)
        for threshold, users in splits.items():
            number = f"_{len(found) + 1}" if found else ""
            summary = describe(table, configs[users[0]].select)
            chart = figures.gap_histogram(f"gaps{number}", summary["histogram"], threshold)
            found.append(
                {
                    "runs": users,
                    "threshold": threshold,
                    "summary": summary,
                    "charts": shown.show(chart),
                    "sizes": shown.table(f"selection{number}", summary["sizes"]),
                    "source": configs[users[0]].select.pair_source,
                    "truth": any(row["easy_accuracy"] is not None for row in summary["sizes"]),
                }
            )
    return found
