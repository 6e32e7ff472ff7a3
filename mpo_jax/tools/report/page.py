"""The report: one self-contained HTML page of a workdir's runs, with all its numbers as CSV beside it."""

import base64
import hashlib
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from filelock import FileLock
from jinja2 import Environment, PackageLoader, StrictUndefined

from mpo_jax.runtime.files import remove
from mpo_jax.tools.report import canvas, contents, figures
from mpo_jax.tools.report.categories import SHOWN, largest
from mpo_jax.tools.report.evidence import Evidence, gather, write_evidence
from mpo_jax.tools.report.markdown import cell, heading
from mpo_jax.tools.report.place import FOLDER, check_place
from mpo_jax.tools.report.results import COLUMNS, RunResult
from mpo_jax.tools.report.seeds import BySeed, collect_seeds
from mpo_jax.tools.report.shown import Shown
from mpo_jax.tools.report.verdict_rows import find_verdicts


def write_report(
    workdir: Path,
    *,
    resamples: int,
    by_seed: BySeed | None = None,
    evidence: Evidence | None = None,
    price: float | None = None,
) -> Path:
    """Writes `<workdir>/report/` from the finished runs and returns its index.html.

    Args:
      workdir: a folder with finished runs, or with those of a table's seeds.
      resamples: bootstrap resamples of the paired differences.
      by_seed: the runs to report; None: those of the table's seeds, or else of the workdir itself.
      evidence: what they show, where that is computed already.
      price: of a device for an hour; the stages' costs are shown with it.

    Raises:
      UserError: if there is no finished run.
    """
    if by_seed is None:
        by_seed = collect_seeds(workdir)
    gathered = gather(by_seed, find_verdicts(workdir), resamples=resamples) if evidence is None else evidence
    return _replace(
        workdir, "page.html.j2", lambda shown: contents.of_evaluated(shown, workdir, gathered, resamples, price)
    )


def write_table_report(
    workdir: Path,
    by_seed: BySeed,
    *,
    resamples: int,
    left_out: dict[str, str] | None = None,
    price: float | None = None,
) -> tuple[Path, Evidence, str]:
    """Writes a table's folders `tables` and `figures` and its report, with the verdicts that are there.

    Args:
      left_out: as for `write_evidence`.

    Returns:
      The page, what it shows, and the claims as text for the terminal.
    """
    evidence = gather(by_seed, find_verdicts(workdir), resamples=resamples)
    claims = write_evidence(workdir, evidence, resamples=resamples, left_out=left_out)
    page = write_report(workdir, resamples=resamples, by_seed=by_seed, evidence=evidence, price=price)
    return page, evidence, claims


def write_training_report(workdir: Path, results: list[RunResult], price: float | None = None) -> Path:
    """Writes `<workdir>/report/` from runs without an evaluation and returns its index.html."""
    return _replace(workdir, "unevaluated.html.j2", lambda shown: contents.of_trained(shown, workdir, results, price))


def _replace(workdir: Path, template: str, content: Callable[[Shown], dict[str, Any]]) -> Path:
    """Writes the report's folder; it takes its place only when all is written.

    A killed run leaves the report that was there before.
    """
    check_place(workdir)
    final, partial, old = (workdir / name for name in (FOLDER, ".report.partial", ".report.old"))
    with FileLock(workdir / ".report.lock"):
        if old.exists() and not final.exists():
            os.rename(old, final)  # killed between the two renames below
        for leftover in (partial, old):
            remove(leftover)
        partial.mkdir()
        shown = Shown()
        values = content(shown)
        shown.write(partial)
        files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*.*"))
        html = _environment().get_template(template).render(values, tables=list(shown.tables), files=files)
        # a lone surrogate, which JSON can carry, is not text that a file could hold
        (partial / "index.html").write_text(html, encoding="utf-8", errors="replace")
        if final.exists():
            os.rename(final, old)
        os.rename(partial, final)
        remove(old)
    return final / "index.html"


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
