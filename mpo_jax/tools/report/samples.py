"""Responses side by side, those on which two runs differ most first."""

import dataclasses
from typing import Any

from mpo_jax.evaluation.answers import SHOWN
from mpo_jax.tools.report.results import RunResult


@dataclasses.dataclass(frozen=True)
class Samples:
    """What the report shows of the evaluations' samples.

    Attributes:
      rows: prompts in the order of the test set, each with its beginning that no policy read, where it was cut to fit,
        the runs' answers and, where two runs are compared, the difference between them.
      first, second: the runs that are compared, None where there are not two.
      measure: by what.
      total: prompts that were answered; the others are left out of the page.
    """

    rows: list[dict[str, Any]]
    first: str | None
    second: str | None
    measure: str
    total: int


def compared(names: list[str]) -> tuple[str, str] | None:
    """The two runs whose differences order the samples: MPO against PPO where they are there, else the last two."""
    if "mpo" in names and "ppo" in names:
        return "mpo", "ppo"
    if "mpo" in names and len(names) > 1:
        return "mpo", [name for name in names if name != "mpo"][-1]
    return (names[-1], names[-2]) if len(names) > 1 else None


def side_by_side(results: list[RunResult], count: int) -> Samples:
    """At most `count` prompts: half of the places go to the largest differences either way, the rest to the first ones.

    Differences are of the true utility where it is known, else of the reward.
    """
    by_run = {result.name: {row["prompt"]: row for row in result.samples()} for result in results}
    prompts = list(dict.fromkeys(prompt for rows in by_run.values() for prompt in rows))
    pair = compared(list(by_run))
    known = all("utility" in row for rows in by_run.values() for row in rows.values())
    column = "utility" if known else "score"
    difference: dict[str, float] = {}
    if pair is not None:
        one, other = (by_run[name] for name in pair)
        difference = {prompt: one[prompt][column] - other[prompt][column] for prompt in one if prompt in other}
    by_size = sorted(difference, key=lambda prompt: -abs(difference[prompt]))
    extremes = by_size[: count // 2] if len(prompts) > count else []
    first = [prompt for prompt in prompts if prompt not in set(extremes)][: count - len(extremes)]
    kept = set(extremes) | set(first)
    rows = [
        {
            "number": number + 1,
            "unread": _unread(prompt, by_run),
            "prompt": prompt,
            "difference": difference.get(prompt),
            "answers": [(name, answers[prompt]) for name, answers in by_run.items() if prompt in answers],
        }
        for number, prompt in enumerate(prompts)
        if prompt in kept
    ]
    # without a script the page shows them in this order too
    rows.sort(key=lambda row: -abs(row["difference"] or 0.0))
    name = {"utility": "true utility", "score": "reward"}[column]
    return Samples(rows, *(pair or (None, None)), measure=name, total=len(prompts))


def _unread(prompt: str, by_run: dict[str, dict[str, Any]]) -> str:
    """The beginning of a prompt that was cut to fit; empty for one that was put into a chat template."""
    shown = next((rows[prompt].get(SHOWN) for rows in by_run.values() if prompt in rows), None)
    return prompt.removesuffix(shown) if shown and prompt.endswith(shown) else ""


SIDE_BY_SIDE = 4
"""Answers of the example; more would not be read beside each other."""


def example(samples: Samples) -> dict[str, Any] | None:
    """The sample that shows the usual: its difference is the median of those on the page that every run answered.

    It has at most `SIDE_BY_SIDE` answers: of SFT and the two runs that are compared, then of others. Where nothing is
    compared, it is the first prompt.
    """
    most = max((len(row["answers"]) for row in samples.rows), default=0)
    whole = [row for row in samples.rows if len(row["answers"]) == most]
    if not whole:
        return None
    known = sorted((row for row in whole if row["difference"] is not None), key=lambda row: row["difference"])
    row = known[(len(known) - 1) // 2] if known else min(whole, key=lambda row: row["number"])
    wanted = ["sft", samples.first, samples.second, *(name for name, _ in row["answers"])]
    kept = list(dict.fromkeys(name for name in wanted if name in dict(row["answers"])))[:SIDE_BY_SIDE]
    return row | {"answers": [(name, answer) for name, answer in row["answers"] if name in kept]}
