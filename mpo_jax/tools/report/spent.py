"""When, where and in how much time the stages of a report's runs were made."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from mpo_jax.errors import Damaged
from mpo_jax.pipeline.run_folder import read_environment
from mpo_jax.runtime.progress import duration
from mpo_jax.tools.report.curves import distinct_by_seed
from mpo_jax.tools.report.results import RunResult
from mpo_jax.tools.report.seeds import BySeed

TITLES = {
    "sft": "SFT", "reward": "Reward model", "select": "Selection", "dpo": "DPO", "ppo": "PPO", "evaluate": "Evaluation",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Made:
    """A stage of one seed, or those of several seeds that the same runs share; of evaluations, all together.

    Attributes:
      stage: its title.
      runs: whose it is, where other runs have one of their own.
      seconds: from begin to end, of all seeds; None where any of them records none.
      device_hours: time by number of devices, of all seeds; None where either is unknown.
    """

    stage: str
    runs: str
    seconds: float | None
    device_hours: float | None

    @property
    def time(self) -> str:
        """For readers."""
        return "not recorded" if self.seconds is None else duration(self.seconds)


@dataclasses.dataclass(frozen=True)
class Spent:
    """What the runs took.

    Attributes:
      finished: the day and minute, UTC, of the newest stage, by the date of its file.
      devices: `4 TPU`; several where runs were made on different ones; empty where none is recorded.
      time: all stages together.
      device_hours: time by number of devices; None where either is unknown.
      price: of a device for an hour, in the user's currency; None: not given.
    """

    stages: list[Made]
    finished: str
    devices: list[str]
    time: str | None
    device_hours: float | None
    price: float | None = None

    def cost(self, made: "Made | Spent") -> str:
        """What a stage, or all of them together, cost, for readers; empty without a price."""
        if self.price is None:
            return ""
        return "unknown" if made.device_hours is None else f"{made.device_hours * self.price:,.2f}"


def spent(by_seed: BySeed, price: float | None = None) -> Spent:
    """Every stage counts once, however many runs and seeds share it.

    Args:
      price: of a device for an hour, in any currency.
    """
    every = [result for results in by_seed.values() for result in results]
    counts = {result.folder: _devices(result.folder) for result in every}
    dates: list[float] = []
    times: dict[tuple[str, str], list[tuple[float | None, float | None]]] = {}
    for stage in TITLES:
        for seed, artifacts in distinct_by_seed(by_seed, stage).items():
            for artifact, runs in artifacts:
                seconds = artifact.manifest.get("seconds")
                dates.append((artifact.path / "manifest.json").stat().st_mtime)
                # every run has an evaluation of its own, and all of them take about as long
                users = "" if stage == "evaluate" else ", ".join(runs)
                number = counts[_first(by_seed[seed], runs)].total()
                hours = seconds * number / 3600 if seconds is not None and number else None
                times.setdefault((stage, users), []).append((seconds, hours))
    shared: Counter[str] = Counter(stage for stage, _ in times)
    stages = [
        Made(TITLES[stage], runs if shared[stage] > 1 else "", *map(_total, zip(*of_seeds, strict=True)))
        for (stage, runs), of_seeds in times.items()
    ]
    whole = _total([stage.seconds for stage in stages])
    return Spent(
        stages=stages,
        finished=datetime.fromtimestamp(max(dates), UTC).strftime("%Y-%m-%d %H:%M UTC"),
        devices=list(dict.fromkeys(filter(None, map(_name, counts.values())))),
        time=None if whole is None else duration(whole),
        device_hours=_total([stage.device_hours for stage in stages]),
        price=price,
    )


def _first(results: list[RunResult], runs: tuple[str, ...]) -> Path:
    return next(result.folder for result in results if result.name == runs[0])


def _devices(run: Path) -> Counter[str]:
    """How many devices of each kind a run had: `cuda:0` and `TPU_0(process=0,(0,0,0,0))` begin with theirs."""
    try:
        names = read_environment(run).get("devices", [])
    except Damaged:  # which is among the report's cautions
        names = []
    return Counter(re.split(r"[^A-Za-z]", name, maxsplit=1)[0] or name for name in names)


def _name(devices: Counter[str]) -> str:
    return " and ".join(f"{number} {kind}" for kind, number in devices.items())


def _total(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None
