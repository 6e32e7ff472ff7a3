"""Every table also by category, where rows name one: made from the prompts and pairs of one category alone."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from mpo_jax.evaluation.answers import CATEGORY
from mpo_jax.evaluation.calibration import read_gap_categories
from mpo_jax.tools.report.claims import RULE, TOO_FEW, claim_rows, unit
from mpo_jax.tools.report.paper_tables import (
    PaperTable,
    accuracy_by_gap,
    mean_reward,
    reward_accuracy,
    subsets,
    variants,
)
from mpo_jax.tools.report.seeds import BySeed, Rows, over_seeds, pair_differences
from mpo_jax.tools.report.verdict_rows import reward_rows

SHOWN = 8
"""Categories on the page and the terminal, the largest; files hold all."""
ENOUGH = 20
"""Prompts of a category, below which no difference in it is tested."""

COUNTS = ("items", "prompts", "pairs", "count")
"""Columns that tell how large a row's category is; the first that the row has."""


def names(by_seed: BySeed) -> list[str]:
    """The categories of test prompts and held-out pairs, largest first; empty where all rows are of one or of none."""
    prompts: Counter[str | None] = Counter()
    pairs: Counter[str | None] = Counter()
    for results in by_seed.values():
        prompts.update(results[0].measured.category)
        if (reward := results[0].artifacts.get("reward")) is not None:
            pairs.update(read_gap_categories(reward.path) or [])
    if max(len(prompts), len(pairs)) < 2:
        return []
    found = [name for name in {*prompts, *pairs} if name is not None]
    return sorted(found, key=lambda name: (-prompts[name], -pairs[name], name))


def of_category(by_seed: BySeed, name: str) -> BySeed:
    """All runs, judged by one category."""
    return {seed: [result.of_category(name) for result in results] for seed, results in by_seed.items()}


def _answered(by_seed: BySeed) -> BySeed:
    """The runs that answered any prompt of their category."""
    kept = {seed: [r for r in results if r.measured.prompts] for seed, results in by_seed.items()}
    return {seed: results for seed, results in kept.items() if results}


def category_rows(by_seed: BySeed) -> Rows:
    """The table of all runs by category."""
    views = {name: _answered(of_category(by_seed, name)) for name in names(by_seed)}
    return [{CATEGORY: name, **row} for name, view in views.items() for row in over_seeds(view)]


def category_tables(by_seed: BySeed, *, resamples: int) -> list[PaperTable]:
    """The tables by category, those that have rows; none where `names` finds none."""
    views = {name: of_category(by_seed, name) for name in names(by_seed)}
    if not views:
        return []
    answered = {name: found for name, view in views.items() if (found := _answered(view))}
    few = f"Below {ENOUGH} prompts nothing is tested"
    claims = (
        f"{RULE} {unit(by_seed)} Here each category is a family of its own, so over many categories some claims are "
        f"bound to pass by chance: read these verdicts as exploration. {few} ({TOO_FEW})."
    )

    def table(name: str, title: str, note: str, parts: dict[str, BySeed], rows: Callable[[BySeed], Rows]) -> PaperTable:
        made = [{CATEGORY: category, **row} for category, part in parts.items() for row in rows(part)]
        return PaperTable(f"{name}_by_category", f"{title}, by category", note, made)

    def of_paper(make: Callable[[BySeed], PaperTable], parts: dict[str, BySeed]) -> PaperTable:
        made = {category: make(part) for category, part in parts.items()}
        first = next(iter(made.values()), PaperTable("", "", "", []))
        rows = [{CATEGORY: category, **row} for category, one in made.items() for row in one.rows]
        return PaperTable(f"{first.name}_by_category", f"{first.title}, by category", first.note, rows)

    errors = "Standard errors as in the table of all prompts; a single prompt has none."
    tables = [
        table("seeds", "All runs on held-out prompts", errors, answered, over_seeds),
        table("claims", "The paper's claims", claims, answered,
              lambda part: claim_rows(part, resamples=resamples, at_least=ENOUGH)),
        table("differences", "Paired differences", f"{few}.", answered,
              lambda part: pair_differences(part, resamples=resamples, at_least=ENOUGH)),
        table("table4", "Table 4: MPO against PPO, by the runs' own rewards",
              "Verdicts of `mpo judge` by category stand in Table 4 itself.", answered,
              lambda part: reward_rows(part, "mpo", "ppo")),
        of_paper(reward_accuracy, views),
        of_paper(accuracy_by_gap, views),
        *(of_paper(make, answered) for make in (mean_reward, variants, subsets)),
    ]  # fmt: skip
    return [one for one in tables if one.rows]


def largest(rows: Rows) -> Rows:
    """The rows of the `SHOWN` largest categories, and all that are of no category or the paper's own."""
    sizes: Counter[str] = Counter()
    for row in rows:
        if row.get(CATEGORY) is not None and row.get("of") != "paper":
            sizes[row[CATEGORY]] += next((row[key] for key in COUNTS if isinstance(row.get(key), int | np.integer)), 0)
    kept = {name for name, _ in sizes.most_common(SHOWN)}
    return [row for row in rows if row.get(CATEGORY) is None or row.get("of") == "paper" or row[CATEGORY] in kept]
