"""`--fit`: finds the remat and micro-batches that fit with the shortest estimated steps, at the same global batches."""

import dataclasses
from collections.abc import Callable

from mpo_jax.config.schema import Config
from mpo_jax.tools.plan.advice import accumulations
from mpo_jax.tools.plan.measure import Measured, Plan, prepare
from mpo_jax.tools.plan.targets import Target

REMATS = ("none", "dots", "full")
STAGES = ("sft", "reward", "dpo", "ppo")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One value of model.remat, with the fewest micro-batches that fit for each stage.

    Attributes:
      accumulation: number of micro-batches by stage, without stages that do not fit.
      seconds: estimated total time of one update of every stage.
    """

    remat: str
    accumulation: dict[str, int]
    seconds: float

    @property
    def fits(self) -> bool:
        return len(self.accumulation) == len(STAGES)

    @property
    def overrides(self) -> list[str]:
        return [f"model.remat={self.remat}"] + [f"{s}.train.accumulation={a}" for s, a in self.accumulation.items()]


def search(config: Config, target: Target, note: Callable[[str], None] = lambda _: None) -> list[Choice]:
    """All three values of remat, best first.

    More micro-batches take less memory but gather the weights more often, so each stage gets the fewest that fit, found
    by bisection.
    """
    choices = []
    for remat in REMATS:
        accumulation, total = {}, 0.0
        for stage in STAGES:
            found = _fewest(config, target, remat, stage, note)
            if found is None:
                break
            accumulation[stage], time = found
            total += time
        choices.append(Choice(remat, accumulation, total))
    return sorted(choices, key=lambda c: (not c.fits, -len(c.accumulation), c.seconds))


def _fewest(
    config: Config, target: Target, remat: str, stage: str, note: Callable[[str], None]
) -> tuple[int, float] | None:
    """The smallest number of micro-batches at which a stage's updates fit, and their estimated seconds."""
    plan = prepare(config, target).changed({"model": {"remat": remat}})
    candidates = accumulations(plan, stage)
    low, high, best = 0, len(candidates) - 1, None
    while low <= high:
        middle = (low + high) // 2
        count = candidates[middle]
        measured = _updates(plan, stage, count)
        fits = all(one.fits for one in measured)
        peak = max((one.peak for one in measured), default=0) / 2**30
        note(f"{stage}: remat={remat} accumulation={count}: {peak:.1f} GiB, {'fits' if fits else 'does not fit'}")
        if fits:
            best = count, sum(one.seconds or 0.0 for one in measured)
            high = middle - 1
        else:
            low = middle + 1
    return best


def _updates(plan: Plan, stage: str, accumulation: int) -> list[Measured]:
    plan = plan.changed({stage: {"train": {"accumulation": accumulation}}})
    return plan.measure(p for p in plan.programs([stage]) if p.accumulation is not None)
