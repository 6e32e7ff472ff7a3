"""What `mpo run` and `mpo table` say of finished runs on the terminal, besides their main table."""

from mpo_jax.runtime.console import console
from mpo_jax.tools.report.categories import SHOWN, category_rows, largest
from mpo_jax.tools.report.results import terminal_table
from mpo_jax.tools.report.seeds import BySeed
from mpo_jax.tools.report.summary import cautions


def show_categories(by_seed: BySeed) -> None:
    """The main table by category, of the largest ones; nothing where rows name none."""
    rows = category_rows(by_seed)
    if rows:
        console.print(terminal_table(largest(rows), f"By category (at most the {SHOWN} largest)"))


def show_cautions(by_seed: BySeed) -> None:
    """What stages warned of, and what makes numbers incomparable, each once."""
    for caution in cautions(by_seed):
        console.print(f"caution: {caution}", style="yellow", soft_wrap=True, markup=False, highlight=False)
