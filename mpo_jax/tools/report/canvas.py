"""The style of all figures: axes, colours, legends, and an image with its numbers. No global matplotlib state."""

import dataclasses
import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpo_jax.config.registry import EXPERIMENTS
from mpo_jax.pipeline.experiments import Variant
from mpo_jax.runtime.files import write_bytes
from mpo_jax.tools.report import svg
from mpo_jax.tools.report.results import write_csv

DPI = 200
SIZE = (4.8, 3.4)
COLORS = ("#000000", "#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
"""Okabe and Ito's palette, which colour-blind readers can distinguish, without yellow, which is faint on paper."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
QUIET = "#555555"
GRID = "#e4e4e4"
FRONT = "#b0b0b0"
THRESHOLD = "#A04000"
ON_PAGE = {
    COLORS[0]: "currentColor",
    COLORS[4]: "var(--blue)",
    COLORS[5]: "var(--vermilion)",
    THRESHOLD: "var(--vermilion)",
    QUIET: "var(--quiet)",
    GRID: "var(--line)",
    "#ffffff": "var(--paper)",
}
"""What the page's style sheet makes of colours that would be lost on its dark background; files keep the colours."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawn figure.

    Attributes:
      name: file name without its ending.
      title: what it shows, with the unit.
      png: the image as a file.
      svg: the image as an element of a page, whose colours follow the page's.
      rows: the numbers in it.
    """

    name: str
    title: str
    png: bytes
    svg: str
    rows: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Writes `<name>.png` and `<name>.csv`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{self.name}.png", [self.png])
        write_csv(folder / f"{self.name}.csv", self.rows)


def style(run: str) -> dict[str, Any]:
    """Colour and marker of a run, the same in every figure and report; markers distinguish runs in black and white.

    MPO at a split of its own has MPO's colour, a dotted line, and the split's value as its marker.
    """
    variant = Variant.of(run)
    index = list(EXPERIMENTS).index(variant.experiment)
    shift = index // len(COLORS)
    # once the colours repeat, other markers are used
    looks = {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[(index + 3 * shift) % len(MARKERS)],
        "linestyle": ("-", "--")[shift % 2],
    }
    if (value := variant.threshold if variant.threshold is not None else variant.easy_fraction) is not None:
        looks |= {"marker": f"${value:g}$", "linestyle": ":" if variant.threshold is not None else "-."}
    return looks


def on_page(color: str) -> str:
    """A colour as the page's style sheet calls it."""
    return ON_PAGE.get(color, color)


def new_axes(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with its axes' names."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9, color=QUIET)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def legend(figure: Figure, columns: int = 4) -> None:
    """The legend below the axes, in as many columns as fit."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # long names, of artifacts that several runs share, need the width
    columns = max(1, min(columns, len(labels), int(66 / (max(map(len, labels)) + 6))))
    # the legend gets room of its own, or many runs would leave little to the axes
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def finish(name: str, title: str, figure: Figure, rows: list[dict[str, Any]]) -> Chart:
    """The figure as an image under its title."""
    figure.axes[0].set_title(title, loc="left", fontsize=10, fontweight="bold")
    image = io.BytesIO()
    # without matplotlib's version in it, equal numbers give equal bytes
    figure.savefig(image, format="png", metadata={"Software": None})
    # the layout stays as it is, and is not computed again
    figure.set_layout_engine("none")
    return Chart(name, title, image.getvalue(), svg.element(name, title, figure, ON_PAGE), rows)
