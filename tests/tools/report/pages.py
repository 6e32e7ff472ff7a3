"""Reading a report's page and its files."""

import csv
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a browser would find: tags with attributes, texts, table rows, and headings' ids."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attributes.get(attribute) or "" for name, attributes in self.tags if name == tag]

    def table(self, first: str, *columns: str) -> list[list[str]]:
        """The rows below the first heading row that begins with these columns, up to the next heading row."""
        heading = (first, *columns)
        start = next(i for i, row in enumerate(self.rows) if tuple(row[: len(heading)]) == heading)
        below = self.rows[start + 1 :]
        ends = [i for i, row in enumerate(below) if row and row[0] in ("run", "claim", "threshold", "gap", "pairs")]
        return below[: ends[0]] if ends else below

    @property
    def sections(self) -> list[str]:
        return self.all("section", "id")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
