"""Runs by name: an experiment and the split of its pairs. Table 3, Table 6 and Figure 4 of the MPO paper."""

import dataclasses
import re
from collections.abc import Iterable

from mpo_jax.config.registry import EXPERIMENTS, Step
from mpo_jax.config.schema import SelectConfig, TableConfig
from mpo_jax.errors import UserError

AT_SPLITS: tuple[str, ...] = ("mpo", "dpo_easy", "dpo_hard", "ppo_easy", "ppo_hard")
"""Experiments that a table runs at every split: MPO (Table 3) and the parts of Figure 4."""

_NAME = re.compile(r"(?P<experiment>\w+?)(?:_(?P<kind>[tf])(?P<value>-?\d[\d.e+-]*))?")


def _exact(value: float) -> str:
    """The shortest text that parses to the same number: 2, 0.25."""
    return repr(float(value)).removesuffix(".0")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run: an experiment, and its own split of the pairs if it differs from the `select` section.

    Attributes:
      threshold: gap above which a pair is easy.
      easy_fraction: fraction of the pairs that is easy; at most one of the two is set.
    """

    experiment: str
    threshold: float | None = None
    easy_fraction: float | None = None

    @property
    def name(self) -> str:
        """The run's folder: `mpo`, `mpo_t2` at threshold 2, `mpo_f0.25` with a quarter easy."""
        if self.threshold is not None:
            return f"{self.experiment}_t{_exact(self.threshold)}"
        return self.experiment if self.easy_fraction is None else f"{self.experiment}_f{_exact(self.easy_fraction)}"

    @classmethod
    def of(cls, name: str) -> "Variant":
        """The variant with this name.

        Raises:
          UserError: if the name is not that of a run.
        """
        found = _NAME.fullmatch(name)
        if found is None or found["experiment"] not in EXPERIMENTS:
            raise UserError(f"no run is called {name}; runs are {', '.join(EXPERIMENTS)}, or mpo_t2 for threshold 2")
        value = None if found["value"] is None else float(found["value"])
        split = {"threshold" if found["kind"] == "t" else "easy_fraction": value}
        return cls(found["experiment"], **split)  # type: ignore[arg-type]

    def select(self, config: SelectConfig) -> SelectConfig:
        """The `select` section with this run's split."""
        if self.threshold is None and self.easy_fraction is None:
            return config
        return config.model_copy(update={"threshold": self.threshold, "easy_fraction": self.easy_fraction})

    @property
    def rank(self) -> tuple[int, bool, float, float]:
        """Sort key for tables: experiments in registry order; within one, thresholds, then fractions, ascending."""
        place = list(EXPERIMENTS).index(self.experiment)
        return place, self != Variant(self.experiment), self.threshold or 0.0, self.easy_fraction or 0.0


def steps_until(experiment: str, until: str) -> tuple[Step, ...]:
    """An experiment's steps up to its last one of the stage `until`; all of them for `evaluate`, none before them."""
    steps = EXPERIMENTS[experiment]
    if until == "evaluate":
        return steps
    return steps[: max((number for number, step in enumerate(steps, 1) if step.algorithm == until), default=0)]


def needs_reward(experiment: str, until: str, select: SelectConfig) -> bool:
    """Whether an experiment up to the stage `until` reads a reward model."""
    if until in ("reward", "evaluate"):
        return True
    if until == "select":
        return select.scores_pairs
    return any(step.needs_reward(selection_scores=select.scores_pairs) for step in steps_until(experiment, until))


def needs_selection(experiment: str, until: str) -> bool:
    """Whether an experiment up to the stage `until` reads a selection."""
    return until == "select" or any(step.needs_selection for step in steps_until(experiment, until))


def is_run(name: str) -> bool:
    """Whether a folder is named like a run."""
    found = _NAME.fullmatch(name)
    return found is not None and found["experiment"] in EXPERIMENTS


def in_order(names: Iterable[str]) -> list[str]:
    """Run names in table order."""
    return sorted(names, key=lambda name: Variant.of(name).rank)


def table_variants(table: TableConfig, select: SelectConfig) -> list[Variant]:
    """The runs of `mpo table` in the order they are made, with those in `AT_SPLITS` at every additional split too."""
    variants = {Variant(name) for name in table.experiment}
    for name in AT_SPLITS:
        if name not in table.experiment:
            continue
        variants |= {Variant(name, threshold=t) for t in table.thresholds if t != select.threshold}
        variants |= {Variant(name, easy_fraction=f) for f in table.easy_fractions if f != select.easy_fraction}
    return sorted(variants, key=lambda variant: variant.rank)
