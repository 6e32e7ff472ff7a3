"""The report's figures of training and of reward gaps: plain rows in, a chart with the same numbers out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpo_jax.config.schema import EVAL
from mpo_jax.evaluation.verdicts import rate
from mpo_jax.tools.report.canvas import (
    COLORS,
    FRONT,
    MARKERS,
    QUIET,
    THRESHOLD,
    Chart,
    finish,
    legend,
    new_axes,
    style,
)
from mpo_jax.tools.report.results import COLUMNS


@dataclasses.dataclass(frozen=True)
class Panel:
    """One metric of a stage: its key in metrics.jsonl, and how people call it."""

    metric: str
    title: str
    unit: str


PANELS = {
    "sft": (Panel("loss", "SFT: loss", "nats a token"),),
    "reward": (
        Panel("loss", "Reward model: loss", "nats a pair"),
        Panel("accuracy", "Reward model: pairs ordered right", "share"),
    ),
    "dpo": (
        Panel("loss", "DPO: loss", "nats a pair"),
        Panel("rewards/margins", "DPO: margin of implicit rewards", "beta x log-ratio"),
        Panel("rewards/accuracies", "DPO: pairs ordered right", "share"),
        Panel("logps/chosen", "DPO: log-probability of chosen", "nats a response"),
        Panel("logps/rejected", "DPO: log-probability of rejected", "nats a response"),
    ),
    "ppo": (
        Panel("objective/scores", "PPO: reward of the samples", "raw score"),
        Panel("objective/utility", "PPO: true utility of the samples", "utility"),
        Panel("objective/kl", "PPO: KL to its reference", "nats a response"),
        Panel("objective/entropy", "PPO: entropy", "nats a response"),
        Panel("response_length/mean", "PPO: response length", "tokens"),
        Panel("critic/explained_variance", "PPO: variance explained by the critic", "share"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Series:
    """The logged metrics of one artifact, or of its twins of several seeds, which one or more runs share.

    Attributes:
      runs: whose it is.
      seeds: each seed's lines of metrics.
    """

    runs: tuple[str, ...]
    seeds: tuple[list[dict[str, Any]], ...]

    @property
    def label(self) -> str:
        return ", ".join(self.runs) if len(self.runs) < 4 else f"{self.runs[0]}, {self.runs[1]} + {len(self.runs) - 2}"

    def points(self, metric: str) -> list[dict[str, Any]]:
        """Mean over seeds at every step that all of them logged; with several seeds also the lowest and the highest."""
        by_step: dict[int, list[float]] = {}
        for line in self.seeds:
            for row in line:
                if metric in row:
                    by_step.setdefault(row["step"], []).append(row[metric])
        points = []
        for step, values in sorted(by_step.items()):
            if len(values) == len(self.seeds):
                point = {"series": self.label, "step": step, metric: sum(values) / len(values)}
                if len(values) > 1:
                    point |= {f"{metric}_low": min(values), f"{metric}_high": max(values)}
                points.append(point)
        return points


def curves(stage: str, series: Sequence[Series]) -> list[Chart]:
    """A chart for each of a stage's panels that any series has."""
    charts = []
    for panel in PANELS[stage]:
        lines = [(line.points(panel.metric), line.points(EVAL + panel.metric)) for line in series]
        rows = [row for line in lines for points in line for row in points]
        if rows:
            name = f"{stage}_{panel.metric.replace('/', '_')}"
            charts.append(finish(name, panel.title, _curve(panel, series, lines), rows))
    return charts


Points = list[dict[str, Any]]

HELD_OUT: dict[str, Any] = {"linestyle": (0, (4, 2)), "markerfacecolor": "white", "linewidth": 1.1}
"""How a curve on held-out rows differs from the training curve of its colour and marker."""


def _curve(panel: Panel, series: Sequence[Series], lines: list[tuple[Points, Points]]) -> Figure:
    """Each series' points in training, and on held-out rows."""
    figure, axes = new_axes("update", panel.unit)
    drawn = [(line, *points) for line, points in zip(series, lines, strict=True) if any(points)]
    for line, training, held_out in drawn:
        looks = style(line.runs[0]) | {"markersize": 4, "linewidth": 1.4}
        _draw(axes, panel.metric, training, looks | {"label": line.label})
        _draw(axes, EVAL + panel.metric, held_out, looks | HELD_OUT)
    if measured := any(held_out for *_, held_out in drawn):
        axes.plot([], [], color=QUIET, marker="o", markersize=4, label="on held-out rows", **HELD_OUT)
    if measured or len(drawn) > 1:
        legend(figure)
    return figure


def _draw(axes: Axes, metric: str, points: Points, looks: dict[str, Any]) -> None:
    """One curve, and the range over seeds where there are several."""
    if not points:
        return
    steps = [row["step"] for row in points]
    # a marker on every point would hide the line
    axes.plot(steps, [row[metric] for row in points], markevery=max(1, len(points) // 8), **looks)
    if f"{metric}_low" in points[0]:
        low, high = ([row[f"{metric}_{end}"] for row in points] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=looks["color"], alpha=0.15, linewidth=0)


def pareto(rows: list[dict[str, Any]], column: str) -> list[bool]:
    """Of each row, whether no other has both no more KL and no less of `column`, and one of the two strictly."""

    def better(a: dict[str, Any], b: dict[str, Any]) -> bool:
        differs = a["kl"] != b["kl"] or a[column] != b[column]
        return a["kl"] <= b["kl"] and a[column] >= b[column] and differs

    return [not any(better(other, row) for other in rows) for row in rows]


def tradeoff(rows: list[dict[str, Any]], column: str) -> Chart | None:
    """A point a run: `column` against KL to SFT, each with one standard error; None where no run has both.

    A grey line joins the runs that no other beats in both.
    """
    shown = [row for row in rows if "kl" in row and column in row]
    if not shown:
        return None
    figure, axes = new_axes("KL to SFT, nats a response", f"{COLUMNS[column]}, mean")
    front = pareto(shown, column)
    line = sorted((row["kl"], row[column]) for row, first in zip(shown, front, strict=True) if first)
    axes.plot(*zip(*line, strict=True), color=FRONT, linewidth=1.2, zorder=0, drawstyle="steps-post")
    for row in shown:
        looks: dict[str, Any] = style(row["run"]) | {"linestyle": "none"}
        axes.errorbar(
            row["kl"], row[column], xerr=row["kl_se"], yerr=row[f"{column}_se"],
            label=row["run"], markersize=6, capsize=3, elinewidth=1, **looks,
        )  # fmt: skip
    legend(figure)
    keys = ("run", "kl", "kl_se", column, f"{column}_se")
    name = {"score": "reward_against_kl", "utility": "utility_against_kl"}[column]
    title = f"{COLUMNS[column].capitalize()} against KL to SFT"
    kept = [{key: row[key] for key in keys} | {"pareto": first} for row, first in zip(shown, front, strict=True)]
    return finish(name, title, figure, kept)


def gap_histogram(name: str, histogram: dict[str, list[float]], threshold: float) -> Chart:
    """How many pairs have which gap, with the threshold between hard (left) and easy (right)."""
    counts, edges = np.asarray(histogram["counts"]), np.asarray(histogram["edges"])
    figure, axes = new_axes("reward gap of the pair", "pairs")
    axes.stairs(counts, edges, fill=True, color=COLORS[1], alpha=0.75)
    span = edges[-1] - edges[0]
    # a threshold far outside would squeeze the histogram into a line
    if edges[0] - span <= threshold <= edges[-1] + span:
        axes.axvline(threshold, color=COLORS[5], linewidth=1.6)
        words: dict[str, Any] = {"color": THRESHOLD, "fontsize": 9, "textcoords": "offset points"}
        axes.annotate("hard", (threshold, 1), (-4, -10), xycoords=axes.get_xaxis_transform(), ha="right", **words)
        easy = f"easy: gap > {threshold:.3g}"
        axes.annotate(easy, (threshold, 1), (4, -10), xycoords=axes.get_xaxis_transform(), **words)
    rows = [
        {"low": low, "high": high, "pairs": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return finish(name, "Pairs by reward gap", figure, rows)


def accuracy_rows(source: str, bins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy by gap with 95% Wilson intervals; a bin without pairs has no accuracy."""
    rows = []
    for one in bins:
        row = {"source": source, **{key: one[key] for key in ("low", "high", "count", "share", "accuracy")}}
        if one["count"]:
            # whole and half pairs: a tie is half right
            interval = rate(round(2 * one["accuracy"] * one["count"]) / 2, one["count"])
            assert interval is not None
            row |= {"ci_low": interval.low, "ci_high": interval.high}
        rows.append(row)
    return rows


def gap_label(row: dict[str, Any]) -> str:
    """The bin's name, "0.5 to 1" or "over 3"."""
    return f"{row['low']:g} to {row['high']:g}" if row["high"] is not None else f"over {row['low']:g}"


def accuracy_by_gap(rows: list[dict[str, Any]]) -> Chart:
    """Accuracy of each source by the size of the gap. `rows` are of `accuracy_rows`, several sources together."""
    figure, axes = new_axes("reward gap of the pair", "share ordered right")
    names = list(dict.fromkeys(gap_label(row) for row in rows))
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for index, source in enumerate(sources):
        bins = [row for row in rows if row["source"] == source and row["count"]]
        # sources stand side by side in a bin, or their bars would cover each other
        x = [names.index(gap_label(row)) + 0.14 * (index - (len(sources) - 1) / 2) for row in bins]
        y = np.asarray([row["accuracy"] for row in bins])
        low, high = (np.asarray([row[key] for row in bins]) for key in ("ci_low", "ci_high"))
        color = COLORS[(4, 3, 2, 5, 6, 1, 0)[index % len(COLORS)]]
        axes.errorbar(
            x, y, yerr=np.clip([y - low, high - y], 0, None), label=source, color=color,
            marker=MARKERS[index % len(MARKERS)], markersize=5, linewidth=1.2, capsize=2, elinewidth=1,
        )  # fmt: skip
    axes.axhline(0.5, color=QUIET, linestyle=":", linewidth=1.2)
    axes.annotate("chance", (1, 0.5), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize=8, color=QUIET)  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    legend(figure, columns=1)
    return finish("accuracy_by_gap", "Accuracy by reward gap", figure, rows)
