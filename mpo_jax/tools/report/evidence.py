"""A table's results, computed once: rows over seeds, claims, the paper's tables, calibration and figures."""

import dataclasses
from pathlib import Path

from mpo_jax.runtime.files import read_object, write_json, write_text
from mpo_jax.tools.report import calibration, figures, paper_figures
from mpo_jax.tools.report.canvas import Chart
from mpo_jax.tools.report.categories import category_tables
from mpo_jax.tools.report.claims import RULE, claim_rows, shared_models, unit
from mpo_jax.tools.report.curves import stage_series
from mpo_jax.tools.report.length import EQUAL_NOTE, LENGTH_NOTE, equal_length_rows, length_rows
from mpo_jax.tools.report.markdown import section
from mpo_jax.tools.report.paper_tables import PaperTable, gap_bins, paper_tables
from mpo_jax.tools.report.results import write_csv
from mpo_jax.tools.report.seeds import BySeed, Rows, over_seeds, seed_differences, seed_rows, share_prompts
from mpo_jax.tools.report.summary import cautions
from mpo_jax.tools.report.verdict_rows import Verdicts


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is shown and written; every part may be empty.

    Attributes:
      over: a row a run.
      claims: a row a claim and measure.
      tables: the paper's, ours beside them.
      by_category: all of these by category, where rows name one.
      lengths: a row a run, its length and repetition.
      equal_length: a row a pair of runs, what differs between them at equal length.
      calibration: the bins of the reliability curve, errors by source, and what thresholds do.
      charts: by what they are part of.
    """

    by_seed: BySeed
    over: Rows
    claims: Rows
    tables: list[PaperTable]
    by_category: list[PaperTable]
    lengths: Rows
    equal_length: Rows
    gaps: Rows
    reliability: Rows
    errors: Rows
    thresholds: Rows
    claim_charts: list[Chart]
    tradeoffs: list[Chart]
    figure4: list[Chart]
    calibration_charts: list[Chart]
    over_optimisation: list[Chart]

    @property
    def charts(self) -> list[Chart]:
        parts = (self.claim_charts, self.tradeoffs, self.figure4, self.calibration_charts, self.over_optimisation)
        return [chart for part in parts for chart in part]

    @property
    def rule(self) -> str:
        """How verdicts come about, and over what the bootstrap resamples."""
        return f"{RULE} {unit(self.by_seed)}"

    @property
    def error_over(self) -> str:
        """Over what the standard errors of `over` are."""
        if len(self.by_seed) == 1:
            return "prompts"
        return "seeds and prompts" if share_prompts(self.by_seed) else "seeds"

    def named(self) -> dict[str, Rows]:
        """Every table's rows by file name."""
        named = {"seeds": self.over, "claims": self.claims, "reliability": self.reliability}
        named |= {"length": self.lengths, "equal_length": self.equal_length}
        named |= {"calibration_error": self.errors, "thresholds": self.thresholds}
        named |= {table.name: table.rows for table in (*self.tables, *self.by_category)}
        return {name: rows for name, rows in named.items() if rows}


def gather(by_seed: BySeed, verdicts: Verdicts, *, resamples: int) -> Evidence:
    """Computes it all.

    Args:
      verdicts: of judges and people on these runs.
      resamples: of the bootstrap.
    """
    over = over_seeds(by_seed)
    claims = claim_rows(by_seed, resamples=resamples)
    tables = paper_tables(by_seed, verdicts)
    gaps = [row for name, bins in gap_bins(by_seed).items() for row in figures.accuracy_rows(name, bins)]
    signed = calibration.signed_gaps(by_seed)
    curve, errors = calibration.reliability_rows(signed)
    subset_rows = next((table.rows for table in tables if table.name == "figure4"), [])
    there = {row["subset"] for row in subset_rows}
    measures = ("reward", "utility")
    return Evidence(
        by_seed=by_seed,
        over=over,
        claims=claims,
        tables=tables,
        by_category=category_tables(by_seed, resamples=resamples),
        lengths=length_rows(by_seed),
        equal_length=equal_length_rows(by_seed, resamples=resamples),
        gaps=gaps,
        reliability=curve,
        errors=errors,
        thresholds=calibration.threshold_rows(signed, calibration.used_thresholds(by_seed)),
        claim_charts=_some(*(paper_figures.claims(claims, measure) for measure in ("reward", "true utility"))),
        tradeoffs=_some(*(figures.tradeoff(over, column) for column in ("score", "utility"))),
        # runs on all data alone are no comparison of subsets
        figure4=_some(*(paper_figures.subsets(subset_rows, m) for m in measures)) if there - {"all"} else [],
        calibration_charts=_some(figures.accuracy_by_gap(gaps) if gaps else None, paper_figures.reliability(curve)),
        over_optimisation=_some(paper_figures.over_optimisation(stage_series(by_seed, "ppo"))),
    )


def _some(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


LEFT_OUT = "left_out.json"
"""Beside a table's configuration: the runs that could not be made, and why."""


def write_evidence(workdir: Path, evidence: Evidence, *, resamples: int, left_out: dict[str, str] | None = None) -> str:
    """Writes `<workdir>/tables/*.csv` and `*.md` (all together in `all.md`) and `<workdir>/figures/*.png` and `*.csv`.

    Args:
      left_out: runs that could not be made now, and why; those of earlier calls stay named until they are made.

    Returns:
      The claims as text for the terminal.
    """
    by_seed, folder = evidence.by_seed, workdir / "tables"
    left_out = _left_out(workdir, by_seed, left_out or {})
    each = {"by_seed": seed_rows(by_seed), "differences_by_seed": seed_differences(by_seed, resamples=resamples)}
    for name, rows in (evidence.named() | each).items():
        write_csv(folder / f"{name}.csv", rows)
    for name, text in document(evidence, left_out).items():
        write_text(folder / f"{name}.md", [text])
    for chart in evidence.charts:
        chart.write(workdir / "figures")
    short = [
        {key: row[key] for key in ("claim", "measure", "difference", "ci_low", "ci_high", "p_holm", "verdict")}
        for row in evidence.claims
    ]
    return section("The paper's claims", evidence.rule, short) if short else "No claim of the paper has both its runs."


def _left_out(workdir: Path, by_seed: BySeed, now: dict[str, str]) -> dict[str, str]:
    """The runs that this call and those before have left out, and that are not there."""
    path = workdir / LEFT_OUT
    before = read_object(path, "delete it: it only names runs that mpo table has left out") if path.exists() else {}
    made = {f"{result.name}, seed {seed}" for seed, results in by_seed.items() for result in results}
    found = {name: reason for name, reason in {**before, **now}.items() if name not in made}
    if found or before:
        write_json(path, found)
    return found


def document(evidence: Evidence, left_out: dict[str, str]) -> dict[str, str]:
    """A file a table by name, and `all`: all of them under one heading."""
    parts = {}
    if evidence.claims:
        parts["claims"] = section("The paper's claims", evidence.rule, evidence.claims)
    for table in evidence.tables:
        parts[table.name] = section(table.title, table.note, table.rows)
    note = (
        f"Mean over seeds; standard errors over {evidence.error_over}, then of the spread of the seeds' means alone, "
        f"and over prompts alone. {shared_models(evidence.by_seed)}".rstrip()
    )
    parts["seeds"] = section("All runs on held-out prompts", note, evidence.over)
    parts["length"] = section("Length and repetition", LENGTH_NOTE, evidence.lengths)
    if evidence.equal_length:
        parts["equal_length"] = section("Differences at equal length", EQUAL_NOTE, evidence.equal_length)
    if evidence.errors:
        note = "Of sigmoid(|gap|) as the confidence in an order; ten bins."
        parts["calibration_error"] = section("Expected calibration error", note, evidence.errors)
        note = "Easy: |gap| above the threshold. Accuracy: share ordered right by the reward model."
        parts["thresholds"] = section("What a threshold does", note, evidence.thresholds)
    for table in evidence.by_category:
        parts[table.name] = section(table.title, table.note, table.rows)
    missing = "".join(f"- {name} was left out: {reason}\n" for name, reason in left_out.items())
    missing += "".join(f"- {caution}\n" for caution in cautions(evidence.by_seed))
    seeds = ", ".join(map(str, evidence.by_seed))
    whole = f"# Tables over seed{'s' * (len(evidence.by_seed) > 1)} {seeds}\n\n{missing}\n" + "\n".join(parts.values())
    return {**parts, "all": whole}
