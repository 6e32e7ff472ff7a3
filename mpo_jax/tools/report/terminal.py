"""Tables of runs and of verdicts for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from mpo_jax.evaluation.accuracy import unlike
from mpo_jax.evaluation.answers import CATEGORY
from mpo_jax.evaluation.verdicts import OUTCOMES
from mpo_jax.runtime.console import console
from mpo_jax.tools.report.categories import SHOWN, category_rows, largest
from mpo_jax.tools.report.results import COLUMNS
from mpo_jax.tools.report.seeds import BySeed, Rows
from mpo_jax.tools.report.summary import cautions

HEADINGS = {"win": "A wins", "tie": "tie", "lose": "A loses"}


def runs_table(rows: Rows, title: str) -> Table:
    """The main table: mean ± standard error of each run."""
    table = Table(title=title, title_justify="left")
    keys = [key for key in (CATEGORY, "run") if any(key in row for row in rows)]
    for key in keys:
        table.add_column(key)
    present = [column for column in COLUMNS if any(column in row for row in rows)]
    for column in present:
        table.add_column(COLUMNS[column], justify="right")
    for row in rows:
        table.add_row(*(escape(row[key]) for key in keys), *(_cell(row, column) for column in present))
    return table


def _cell(row: dict[str, Any], column: str) -> str:
    if column not in row:
        return "-"
    if column == "has_eos":
        return f"{row[column]:.1%}"
    if column == "length":
        return f"{row[column]:.1f}"
    error = row[f"{column}_se"]
    return f"{row[column]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def print_categories(by_seed: BySeed) -> None:
    """Prints the main table by category, of the largest ones; nothing where rows name no category."""
    rows = category_rows(by_seed)
    if rows:
        console.print(runs_table(largest(rows), f"By category (at most the {SHOWN} largest)"))


def print_cautions(by_seed: BySeed) -> None:
    """Prints the stages' warnings, and what makes numbers incomparable, each once."""
    for caution in cautions(by_seed):
        console.print(f"caution: {caution}", style="yellow", soft_wrap=True, markup=False, highlight=False)


def verdict_table(title: str, unit: str, result: Mapping[str, Any]) -> Table:
    """A row for each tally of `result["by_category"]`, where there are any, and one for `result["verdict"]`.

    Args:
      unit: what is counted, a plural.
    """
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("category")
    for column in (unit, *HEADINGS.values()):
        shown.add_column(column, justify="right")
    by_category = result.get("by_category", {})
    for name, tally in [*by_category.items(), (unlike("all", by_category), result["verdict"])]:
        cells = ("-" if tally["rates"][o] is None else share(tally["rates"][o]) for o in OUTCOMES)
        shown.add_row(escape(name), str(sum(tally[o] for o in OUTCOMES)), *cells)
    return shown


def share(rate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
