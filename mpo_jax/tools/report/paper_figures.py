"""Figures of the table: claims with intervals, Figure 4, calibration, and reward over-optimisation along PPO."""

import math
from collections.abc import Sequence
from typing import Any

from mpo_jax.tools.report.canvas import COLORS, QUIET, SIZE, Chart, finish, legend, new_axes, style
from mpo_jax.tools.report.figures import Series

VERDICT_LOOKS = {"supported": ("#0072B2", "o"), "contradicted": ("#D55E00", "X"), "undecided": (QUIET, "s")}


def claims(rows: Sequence[dict[str, Any]], measure: str) -> Chart | None:
    """Each claim's difference with its 95% interval; right of 0 is as claimed. `rows` are of `claim_rows`."""
    shown = [row for row in rows if row["measure"] == measure and math.isfinite(row["ci_low"])]
    if not shown:
        return None
    figure, axes = new_axes(f"difference in {measure}, as claimed", "")
    figure.set_size_inches(SIZE[0] + 1.4, 1.1 + 0.36 * len(shown))
    for verdict, (color, marker) in VERDICT_LOOKS.items():
        places = [place for place, row in enumerate(shown) if row["verdict"] == verdict]
        if places:
            x = [shown[place]["difference"] for place in places]
            # rounding can put a mean a hair outside its own interval where there is no spread
            low = [max(shown[place]["difference"] - shown[place]["ci_low"], 0.0) for place in places]
            high = [max(shown[place]["ci_high"] - shown[place]["difference"], 0.0) for place in places]
            axes.errorbar(x, places, xerr=[low, high], color=color, marker=marker, linestyle="none", markersize=6,
                          capsize=3, elinewidth=1.4, label=verdict)  # fmt: skip
    axes.axvline(0, color=QUIET, linewidth=1)
    axes.set_yticks(range(len(shown)), [row["claim"] for row in shown])
    axes.invert_yaxis()
    legend(figure)
    name = "claims" if measure == "reward" else f"claims_{measure.replace(' ', '_')}"
    return finish(name, f"The paper's claims, by {measure}", figure, [dict(row) for row in shown])


def subsets(rows: Sequence[dict[str, Any]], measure: str) -> Chart | None:
    """Figure 4: DPO and PPO on easy and hard at every split, and on all, with standard errors.

    They are over seeds, or over prompts with one seed.

    Args:
      rows: of the table `figure4`.
      measure: reward or utility.
    """
    shown = [row for row in rows if measure in row]
    if not shown:
        return None
    order = ("easy", "hard", "all")
    parts = sorted(dict.fromkeys(map(_part, shown)), key=lambda part: order.index(part[0]))
    figure, axes = new_axes("trained on", f"mean {'true utility' if measure == 'utility' else 'reward'}")
    for number, algorithm in enumerate(("DPO", "PPO")):
        own = [row for row in shown if row["algorithm"] == algorithm]
        if own:
            x = [parts.index(_part(row)) + 0.12 * (number - 0.5) for row in own]
            errors = [row[f"{measure}_se_seeds"] or row[f"{measure}_se_prompts"] or 0.0 for row in own]
            looks: dict[str, Any] = style(algorithm.lower()) | {"linestyle": "none"}
            axes.errorbar(
                x, [row[measure] for row in own], yerr=errors, label=algorithm, markersize=6, capsize=3, **looks
            )
    several = len({split for _, split in parts if split}) > 1
    axes.set_xticks(range(len(parts)), ["\n".join(filter(None, part)) if several else part[0] for part in parts])
    axes.margins(x=0.15)
    legend(figure)
    name = "figure4" if measure == "reward" else f"figure4_{measure}"
    return finish(name, "Figure 4: easy, hard and all", figure, [dict(row) for row in shown])


def _part(row: dict[str, Any]) -> tuple[str, str | None]:
    """What a row of Figure 4 was trained on: the subset, and where it was split off."""
    return row["subset"], row["split"]


def reliability(rows: Sequence[dict[str, Any]]) -> Chart | None:
    """Accuracy against confidence, sigmoid(|gap|), of each source of pairs, with the diagonal of a calibrated model.

    `rows` are bins of `evaluation.calibration.reliability` with the key `pairs`.
    """
    if not rows:
        return None
    figure, axes = new_axes("confidence, sigmoid of the gap", "share ordered right")
    axes.plot([0.5, 1.0], [0.5, 1.0], color=QUIET, linestyle=":", linewidth=1.2)
    axes.annotate("calibrated", (0.9, 0.9), (6, -8), textcoords="offset points", fontsize=8, color=QUIET)
    for number, source in enumerate(dict.fromkeys(row["pairs"] for row in rows)):
        own = [row for row in rows if row["pairs"] == source]
        axes.plot(
            [row["confidence"] for row in own], [row["accuracy"] for row in own], label=source, linewidth=1.3,
            color=COLORS[(4, 3, 5)[number % 3]], marker="osD"[number % 3], markersize=5,
        )  # fmt: skip
    legend(figure, columns=1)
    return finish("reliability", "Reliability of the reward model", figure, [dict(row) for row in rows])


def over_optimisation(series: Sequence[Series]) -> Chart | None:
    """True utility against reward of PPO's own samples, from first update (hollow) to last; None without a truth.

    A line that bends down gains reward and loses what the reward stands for.
    """
    rows: list[dict[str, Any]] = []
    figure, axes = new_axes("reward of the samples, mean", "true utility of the samples, mean")
    drawn = 0
    for line in series:
        reward = {row["step"]: row["objective/scores"] for row in line.points("objective/scores")}
        truth = {row["step"]: row["objective/utility"] for row in line.points("objective/utility")}
        divergence = {row["step"]: row["objective/kl"] for row in line.points("objective/kl")}
        steps = [step for step in truth if step in reward]
        if not steps:
            continue
        x, y = [reward[step] for step in steps], [truth[step] for step in steps]
        looks = style(line.runs[0])
        axes.plot(x, y, color=looks["color"], linestyle=looks["linestyle"], linewidth=1.3, label=line.label)
        axes.plot(x[0], y[0], marker="o", markersize=6, markerfacecolor="white", color=looks["color"])
        axes.plot(x[-1], y[-1], marker=looks["marker"], markersize=7, color=looks["color"])
        rows += [
            {"series": line.label, "step": step, "reward": reward[step], "utility": truth[step],
             "kl_to_reference": divergence.get(step)}
            for step in steps
        ]  # fmt: skip
        drawn += 1
    if not drawn:
        return None
    legend(figure)
    return finish("over_optimisation", "Utility against reward along PPO", figure, rows)
