"""What a report writes into files beside its page: tables by name, and charts."""

import dataclasses
from pathlib import Path

from mpo_jax.tools.report.canvas import Chart
from mpo_jax.tools.report.results import write_csv
from mpo_jax.tools.report.seeds import Rows


@dataclasses.dataclass
class Shown:
    """Collects them while the page's content is put together."""

    tables: dict[str, Rows] = dataclasses.field(default_factory=dict)
    charts: list[Chart] = dataclasses.field(default_factory=list)

    def table(self, name: str, rows: Rows) -> Rows:
        """Keeps rows for `tables/<name>.csv`; nothing is kept of an empty table."""
        if rows:
            self.tables[name] = rows
        return rows

    def show(self, *charts: Chart | None) -> list[Chart]:
        """Keeps the charts that there are for `figures/`."""
        there = [chart for chart in charts if chart is not None]
        self.charts += there
        return there

    def write(self, folder: Path) -> None:
        """Writes `tables/*.csv`, `figures/*.png` and `figures/*.csv`."""
        for name, rows in self.tables.items():
            write_csv(folder / "tables" / f"{name}.csv", rows)
        for chart in self.charts:
            chart.write(folder / "figures")
