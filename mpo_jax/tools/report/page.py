"""The report: one self-contained HTML page of a workdir's finished runs, with all its numbers as CSV beside it."""

import base64
import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import Any

from filelock import FileLock
from jinja2 import Environment, PackageLoader, StrictUndefined

from mpo_jax.config.schema import EVAL
from mpo_jax.runtime.files import remove
from mpo_jax.runtime.version import __version__
from mpo_jax.tools.report import canvas, figures, provenance, summary
from mpo_jax.tools.report.categories import SHOWN, largest
from mpo_jax.tools.report.claims import unit
from mpo_jax.tools.report.curves import distinct, stage_series
from mpo_jax.tools.report.evidence import Evidence, gather
from mpo_jax.tools.report.markdown import cell, heading
from mpo_jax.tools.report.results import COLUMNS
from mpo_jax.tools.report.samples import example, side_by_side
from mpo_jax.tools.report.seeds import BySeed, Rows, collect_seeds, pair_differences, seed_rows
from mpo_jax.tools.report.selection import selections
from mpo_jax.tools.report.shown import Shown
from mpo_jax.tools.report.spent import spent
from mpo_jax.tools.report.verdict_rows import find_verdicts, verdict_rows

CLAIM_COLUMNS = ("claim", "verdict", "measure", "difference", "ci_low", "ci_high", "p_holm", "seeds", "source")
"""Of a claim's row, what the page shows; the file has all."""
PAPER_COLUMNS = ("paper_hh", "paper_tldr")
STAGE_NAMES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "ppo": "PPO"}


def write_report(
    workdir: Path, *, resamples: int, by_seed: BySeed | None = None, evidence: Evidence | None = None
) -> Path:
    """Writes `<workdir>/report/` from the finished runs and returns its index.html.

    The folder takes its place only when all is written: a killed run leaves the report that was there before.

    Args:
      workdir: a folder with finished runs, or with those of a table's seeds.
      resamples: bootstrap resamples of the paired differences.
      by_seed: the runs to report; None: those of the table's seeds, or else of the workdir itself.
      evidence: what they show, where that is computed already.

    Raises:
      UserError: if there is no finished run.
    """
    if by_seed is None:
        by_seed = collect_seeds(workdir)
    if evidence is None:
        evidence = gather(by_seed, find_verdicts(workdir), resamples=resamples)
    final, partial, old = (workdir / name for name in ("report", ".report.partial", ".report.old"))
    with FileLock(workdir / ".report.lock"):
        if old.exists() and not final.exists():
            os.rename(old, final)  # killed between the two renames below
        for leftover in (partial, old):
            remove(leftover)
        partial.mkdir()
        _write(partial, workdir, evidence, resamples)
        if final.exists():
            os.rename(final, old)
        os.rename(partial, final)
        remove(old)
    return final / "index.html"


def _write(folder: Path, workdir: Path, evidence: Evidence, resamples: int) -> None:
    shown = Shown()
    html = _environment().get_template("page.html.j2").render(_content(shown, workdir, evidence, resamples))
    shown.write(folder)
    # a lone surrogate, which JSON can carry, is not text that a file could hold
    (folder / "index.html").write_text(html, encoding="utf-8", errors="replace")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mpo_jax.tools.report", "templates"),
        autoescape=True,  # prompts and responses are anybody's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": lambda value: f"{value:+.3f}",
        "percent": lambda value: "-" if value is None else f"{value:.1%}",
        "gap_label": figures.gap_label,
        "heading": heading,
        "largest": largest,
    }
    templates = resources.files("mpo_jax.tools.report") / "templates"
    script, sheet = ((templates / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    environment.globals |= {
        "columns": COLUMNS,
        "most_categories": SHOWN,
        "cell": _cell,
        "plain": cell,
        "color": lambda run: canvas.on_page(canvas.style(run)["color"]),
        "script": script,
        "sheet": sheet,
        # the browser runs this script and no other, whatever a response holds
        "script_hash": f"sha256-{digest}",
    }
    return environment


def _content(shown: Shown, workdir: Path, evidence: Evidence, resamples: int) -> dict[str, Any]:
    """Everything that the template shows; what a workdir has not is empty and its section left out."""
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
    stages = _stages(shown, by_seed)
    curves = (chart for stage in stages for chart in stage["charts"])
    return {
        "title": workdir.resolve().name,
        "version": __version__,
        "seeds": list(by_seed),
        "first_seed": first_seed,
        "what": summary.what(by_seed, rows),
        "verdict": summary.verdict(by_seed, rows, resamples=resamples),
        "disagreement": summary.disagreement(best),
        "gains": summary.gains(rows, differences),
        "example": example(samples),
        "spent": spent(by_seed),
        "policy": next((provenance.policy(workdir, run) for run in first if run.name == winner), None),
        "claims": [{key: row[key] for key in claim_columns} for row in evidence.claims],
        "paper_tables": evidence.tables if beside_paper else [],
        "judged": verdict_rows(find_verdicts(workdir)),
        "cautions": summary.cautions(by_seed),
        "design": unit(by_seed),
        "rows": rows,
        "best": best,
        "evidence": evidence,
        "differences": _by_pair(differences),
        "stages": stages,
        "held_out": any(key.startswith(EVAL) for chart in curves for row in chart.rows for key in row),
        "selections": selections(shown, first),
        "rewards": [
            artifact.manifest["summary"]
            for artifact, _ in distinct(every, "reward")
            if artifact.manifest["summary"].get("held_out_accuracy") is not None
        ],
        "samples": samples,
        "sources": provenance.sources(shown, every),
        "truncation": provenance.truncation(shown, first),
        "steps": provenance.steps(by_seed),
        "config_differences": shown.table("config_differences", provenance.config_differences(by_seed)),
        "environments": provenance.environments(every),
        "commands": provenance.commands(workdir, by_seed),
        "artifacts": provenance.artifacts(workdir, by_seed),
        "tables": list(shown.tables),
    }


def _cell(row: dict[str, Any], column: str) -> str:
    """A number of the main table with its standard error."""
    if column not in row:
        return "-"
    value, se = row[column], row[f"{column}_se"]
    if se is None:
        # a single prompt says nothing of others
        return f"{value:.1%}" if column == "has_eos" else f"{value:.{1 if column == 'length' else 3}f}"
    if column == "has_eos":
        return f"{value:.1%} ±\N{NO-BREAK SPACE}{se:.1%}"
    digits = 1 if column == "length" else 3
    return f"{value:.{digits}f} ±\N{NO-BREAK SPACE}{se:.{digits}f}"


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
