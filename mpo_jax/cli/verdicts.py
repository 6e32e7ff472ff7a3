"""Win, tie and lose on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from mpo_jax.evaluation.verdicts import OUTCOMES

HEADINGS = {"win": "A wins", "tie": "tie", "lose": "A loses"}


def table(title: str, unit: str, result: Mapping[str, Any]) -> Table:
    """A row for each tally of `result["by_category"]`, where that is there, and one for `result["verdict"]`.

    Args:
      unit: what is counted, a plural.
    """
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("category")
    for column in (unit, *HEADINGS.values()):
        shown.add_column(column, justify="right")
    for name, tally in {**result.get("by_category", {}), "all": result["verdict"]}.items():
        cells = ("-" if tally["rates"][o] is None else share(tally["rates"][o]) for o in OUTCOMES)
        shown.add_row(escape(name), str(sum(tally[o] for o in OUTCOMES)), *cells)
    return shown


def share(rate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
