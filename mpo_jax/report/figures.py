"""The report's figures: plain rows in, a PNG with the same numbers as CSV out. No global matplotlib state."""

import base64
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest

from mpo_jax.experiments import EXPERIMENTS
from mpo_jax.report.results import COLUMNS, write_csv

DPI = 200
SIZE = (4.8, 3.4)
COLORS = ("#000000", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
"""Okabe and Ito's palette, which colour-blind readers tell apart, without yellow, which paper swallows."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
QUIET = "#555555"


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawn figure.

    Attributes:
      name: file name without its ending.
      title: what it shows, with the unit.
      png: the image.
      rows: the numbers in it.
    """

    name: str
    title: str
    png: bytes
    rows: list[dict[str, Any]]

    @property
    def uri(self) -> str:
        """The image as a data address, for a page that needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    def write(self, folder: Path) -> None:
        """Writes `<name>.png` and `<name>.csv`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.png").write_bytes(self.png)
        write_csv(folder / f"{self.name}.csv", self.rows)


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
        Panel("accuracy", "Reward model: accuracy on training pairs", "share"),
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
        Panel("objective/kl", "PPO: KL to its reference", "nats a response"),
        Panel("objective/entropy", "PPO: entropy", "nats a response"),
        Panel("response_length/mean", "PPO: response length", "tokens"),
        Panel("critic/explained_variance", "PPO: variance explained by the critic", "share"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Series:
    """The logged metrics of one artifact, which one or more runs share."""

    runs: tuple[str, ...]
    metrics: list[dict[str, Any]]

    @property
    def label(self) -> str:
        return ", ".join(self.runs) if len(self.runs) < 4 else f"{self.runs[0]}, {self.runs[1]} + {len(self.runs) - 2}"


def style(run: str) -> dict[str, Any]:
    """Colour and marker of a run: the same in every figure and every report, in black and white by the marker."""
    index = list(EXPERIMENTS).index(run)  # type: ignore[arg-type]
    shift = index // len(COLORS)
    # the second round through the colours takes other markers
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[(index + 3 * shift) % len(MARKERS)],
        "linestyle": ("-", "--")[shift % 2],
    }


def curves(stage: str, series: Sequence[Series]) -> list[Chart]:
    """A chart for each of a stage's panels that any series has."""
    charts = []
    for panel in PANELS[stage]:
        rows = [
            {"series": line.label, "step": row["step"], panel.metric: row[panel.metric]}
            for line in series
            for row in line.metrics
            if panel.metric in row
        ]
        if rows:
            name = f"{stage}_{panel.metric.replace('/', '_')}"
            charts.append(_chart(name, panel.title, _curve(panel, series), rows))
    return charts


def _curve(panel: Panel, series: Sequence[Series]) -> Figure:
    figure, axes = _axes("update", panel.unit)
    drawn = 0
    for line in series:
        points = [(row["step"], row[panel.metric]) for row in line.metrics if panel.metric in row]
        if points:
            # a marker on every point would hide the line
            every = max(1, len(points) // 8)
            looks = style(line.runs[0]) | {"markersize": 4, "linewidth": 1.4, "markevery": every}
            axes.plot(*zip(*points, strict=True), label=line.label, **looks)
            drawn += 1
    if drawn > 1:
        _legend(figure)
    return figure


def tradeoff(rows: list[dict[str, Any]], column: str) -> Chart | None:
    """A point a run: `column` against KL to SFT, each with one standard error; None where no run has both."""
    shown = [row for row in rows if "kl" in row and column in row]
    if not shown:
        return None
    figure, axes = _axes("KL to SFT, nats a response", f"{COLUMNS[column]}, mean")
    for row in shown:
        looks: dict[str, Any] = style(row["run"]) | {"linestyle": "none"}
        axes.errorbar(
            row["kl"], row[column], xerr=row["kl_se"], yerr=row[f"{column}_se"],
            label=row["run"], markersize=6, capsize=3, elinewidth=1, **looks,
        )  # fmt: skip
    _legend(figure)
    keys = ("run", "kl", "kl_se", column, f"{column}_se")
    name = {"score": "reward_against_kl", "utility": "utility_against_kl"}[column]
    title = f"{COLUMNS[column].capitalize()} against KL to SFT"
    return _chart(name, title, figure, [{key: row[key] for key in keys} for row in shown])


def gap_histogram(name: str, histogram: dict[str, list[float]], threshold: float) -> Chart:
    """How many pairs have which gap, with the threshold between hard (left) and easy (right)."""
    counts, edges = np.asarray(histogram["counts"]), np.asarray(histogram["edges"])
    figure, axes = _axes("reward gap of the pair", "pairs")
    axes.stairs(counts, edges, fill=True, color="#56B4E9", alpha=0.75)
    span = edges[-1] - edges[0]
    # a threshold far outside would squeeze the histogram into a line
    if edges[0] - span <= threshold <= edges[-1] + span:
        axes.axvline(threshold, color="#D55E00", linewidth=1.6)
        words: dict[str, Any] = {"color": "#A04000", "fontsize": 9, "textcoords": "offset points"}
        axes.annotate("hard", (threshold, 1), (-4, -10), xycoords=axes.get_xaxis_transform(), ha="right", **words)
        easy = f"easy: gap > {threshold:.3g}"
        axes.annotate(easy, (threshold, 1), (4, -10), xycoords=axes.get_xaxis_transform(), **words)
    rows = [
        {"low": low, "high": high, "pairs": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return _chart(name, "Pairs by reward gap", figure, rows)


def accuracy_rows(source: str, bins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy by gap with 95% Wilson intervals; a bin without pairs has no accuracy."""
    rows = []
    for one in bins:
        row = {"source": source, **{key: one[key] for key in ("low", "high", "count", "share", "accuracy")}}
        if one["count"]:
            right = round(one["accuracy"] * one["count"])
            interval = binomtest(right, one["count"]).proportion_ci(method="wilson")
            row |= {"ci_low": float(interval.low), "ci_high": float(interval.high)}
        rows.append(row)
    return rows


def gap_label(row: dict[str, Any]) -> str:
    """The bin's name, "0.5 to 1" or "over 3"."""
    return f"{row['low']:g} to {row['high']:g}" if row["high"] is not None else f"over {row['low']:g}"


def accuracy_by_gap(rows: list[dict[str, Any]]) -> Chart:
    """Accuracy of each source by the size of the gap. `rows` are of `accuracy_rows`, several sources together."""
    figure, axes = _axes("reward gap of the pair", "share ordered right")
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
    _legend(figure, columns=1)
    return _chart("accuracy_by_gap", "Accuracy by reward gap", figure, rows)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9, color=QUIET)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(figure: Figure, columns: int = 4) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # long names, of artifacts that several runs share, need the width
    columns = max(1, min(columns, len(labels), int(66 / (max(map(len, labels)) + 6))))
    # the legend gets room of its own, or many runs would leave little to the axes
    figure.set_figheight(SIZE[1] + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _chart(name: str, title: str, figure: Figure, rows: list[dict[str, Any]]) -> Chart:
    figure.axes[0].set_title(title, loc="left", fontsize=10, fontweight="bold")
    image = io.BytesIO()
    # without the version of matplotlib in it, the same numbers give the same bytes
    figure.savefig(image, format="png", metadata={"Software": None})
    return Chart(name, title, image.getvalue(), rows)
