"""What the report's pages show: that of evaluated runs, and that of runs that were only trained."""

from pathlib import Path
from typing import Any

from mpo_jax.config.schema import EVAL
from mpo_jax.runtime.version import __version__
from mpo_jax.tools.report import figures, provenance, summary
from mpo_jax.tools.report.claims import unit
from mpo_jax.tools.report.curves import distinct, stage_series
from mpo_jax.tools.report.evidence import Evidence
from mpo_jax.tools.report.length import EQUAL_NOTE, LENGTH_NOTE
from mpo_jax.tools.report.results import RunResult
from mpo_jax.tools.report.samples import example, side_by_side
from mpo_jax.tools.report.seeds import BySeed, Rows, pair_differences, seed_rows
from mpo_jax.tools.report.selection import selections
from mpo_jax.tools.report.shown import Shown
from mpo_jax.tools.report.spent import spent
from mpo_jax.tools.report.unevaluated import last_measures
from mpo_jax.tools.report.verdict_rows import find_verdicts, verdict_rows

CLAIM_COLUMNS = ("claim", "verdict", "measure", "difference", "ci_low", "ci_high", "p_holm", "seeds", "source")
"""Of a claim's row, what the page shows; the file has all."""
PAPER_COLUMNS = ("paper_hh", "paper_tldr")
STAGE_NAMES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "ppo": "PPO"}


def of_evaluated(
    shown: Shown, workdir: Path, evidence: Evidence, resamples: int, price: float | None = None
) -> dict[str, Any]:
    """Everything that `page.html.j2` shows; what a workdir has not is empty and its section left out."""
    by_seed = evidence.by_seed
    # tables and curves are of all seeds; single pairs, samples and counts are shown of one
    first_seed, first = next(iter(by_seed.items()))
    every = [result for results in by_seed.values() for result in results]
    rows = shown.table("main", evidence.over)
    if len(by_seed) > 1:
        shown.table("by_seed", seed_rows(by_seed))
    differences = shown.table("differences", pair_differences(by_seed, resamples=resamples))
    for name, table in evidence.named().items():
        if name != "seeds":
            shown.table(name, table)
    shown.show(*evidence.charts)
    best = summary.best(rows)
    samples = side_by_side(first, max(result.config.evaluate.num_samples_shown for result in every))
    winner = best.get(summary.measure(rows), first[-1].name)
    beside_paper = provenance.is_comparable_to_paper(workdir, by_seed)
    claim_columns = (*CLAIM_COLUMNS, *(PAPER_COLUMNS if beside_paper else ()))
    return _of_training(shown, workdir, by_seed, price) | {
        "first_seed": first_seed,
        "what": summary.what(by_seed, rows),
        "verdict": summary.verdict(by_seed, rows, resamples=resamples),
        "disagreement": summary.disagreement(best),
        "gains": summary.gains(rows, differences),
        "example": example(samples),
        "policy": next((provenance.policy(workdir, run) for run in first if run.name == winner), None),
        "claims": [{key: row[key] for key in claim_columns} for row in evidence.claims],
        "paper_tables": evidence.tables if beside_paper else [],
        "judged": verdict_rows(find_verdicts(workdir)),
        "cautions": summary.cautions(by_seed),
        "design": unit(by_seed),
        "length_note": LENGTH_NOTE,
        "equal_note": EQUAL_NOTE,
        "rows": rows,
        "best": best,
        "evidence": evidence,
        "differences": _by_pair(differences),
        "rewards": [
            artifact.manifest["summary"]
            for artifact, _ in distinct(every, "reward")
            if artifact.manifest["summary"].get("held_out_accuracy") is not None
        ],
        "samples": samples,
    }


def of_trained(shown: Shown, workdir: Path, results: list[RunResult], price: float | None = None) -> dict[str, Any]:
    """Everything that `unevaluated.html.j2` shows, of runs of one workdir without an evaluation."""
    by_seed = {results[0].config.seed: results}
    measures = [row for result in results for row in last_measures(result)]
    return _of_training(shown, workdir, by_seed, price) | {
        "first_seed": results[0].config.seed,
        "cautions": summary.warnings(by_seed),
        "evaluations": [provenance.evaluation(result) for result in results],
        "policy": provenance.policy(workdir, results[0]) if len(results) == 1 else None,
        "last": shown.table("last_measures", list({row["artifact"]: row for row in measures}.values())),
    }


def _of_training(shown: Shown, workdir: Path, by_seed: BySeed, price: float | None) -> dict[str, Any]:
    """What both pages show: the training, its data and how it was made."""
    first = next(iter(by_seed.values()))
    every = [result for results in by_seed.values() for result in results]
    stages = _stages(shown, by_seed)
    curves = (chart for stage in stages for chart in stage["charts"])
    return {
        "title": workdir.resolve().name,
        "version": __version__,
        "seeds": list(by_seed),
        "spent": spent(by_seed, price),
        "stages": stages,
        "held_out": any(key.startswith(EVAL) for chart in curves for row in chart.rows for key in row),
        "selections": selections(shown, first),
        "sources": provenance.sources(shown, every),
        "truncation": provenance.truncation(shown, first),
        "steps": provenance.steps(by_seed),
        "config_differences": shown.table("config_differences", provenance.config_differences(by_seed)),
        "environments": provenance.environments(every),
        "commands": provenance.commands(workdir, by_seed),
        "artifacts": provenance.artifacts(workdir, by_seed),
    }


def _by_pair(differences: Rows) -> Rows:
    """The differences with a line a pair of runs and the columns beside each other."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in differences:
        pair = pairs.setdefault((row["run"], row["against"]), {"run": row["run"], "against": row["against"]})
        pair[row["column"]] = row
    return list(pairs.values())


def _stages(shown: Shown, by_seed: BySeed) -> list[dict[str, Any]]:
    """The training curves by stage; stages that no run has are left out."""
    stages = []
    for stage, title in STAGE_NAMES.items():
        charts = shown.show(*figures.curves(stage, stage_series(by_seed, stage)))
        if charts:
            stages.append({"stage": stage, "title": title, "charts": charts})
    return stages
