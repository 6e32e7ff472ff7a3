"""Sheets for people: a page that needs no network, and a table for a spreadsheet. Neither names the sides."""

import csv
import io
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mpo_jax.errors import UserError
from mpo_jax.runtime.files import write_json, write_text
from mpo_jax.tools.human.sheets import Study, read_key

COLUMNS = ("study", "item", "prompt", "left", "right", "choice", "annotator")

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Spreadsheets evaluate a cell that begins with one of these; a leading apostrophe keeps it text."""


def write_study(study: Study, folder: Path) -> Path:
    """Writes `sheets/study.html` and `sheets/study.csv` for people and, outside of `sheets`, `key.json` with the sides.

    Returns:
      The path of the key.

    Raises:
      UserError: if another study's key is there: without it, its sheets are worthless.
    """
    key = folder / "key.json"
    if key.exists() and read_key(key) != study:
        raise UserError(f"{key} is the key of another study: choose another folder with --out DIR, or move it away")
    there = key.exists()
    write_json(key, study.to_dict())
    try:
        write_text(folder / "sheets" / "study.html", [page(study)])
        # a byte order mark tells spreadsheets that the file is UTF-8
        write_text(folder / "sheets" / "study.csv", [table(study)], encoding="utf-8-sig")
    except OSError:
        if not there:
            key.unlink()
        raise
    return key


def page(study: Study) -> str:
    """The HTML page: all of the study's texts, without the sides' names and external files."""
    shown = {
        "study": study.id,
        "items": [
            {"item": i.number, "prompt": i.prompt.strip(), "left": i.left.strip(), "right": i.right.strip()}
            for i in study.items
        ],
    }
    environment = Environment(
        loader=PackageLoader("mpo_jax.tools.human", "."),
        undefined=StrictUndefined,
        autoescape=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(study=study.id, data=_for_script(shown))


def table(study: Study) -> str:
    """CSV with a row an item and empty columns `choice` (left, right or tie) and `annotator`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for item in study.items:
        cells = (_cell(cell) for cell in (item.prompt, item.left, item.right))
        writer.writerow((study.id, item.number, *cells, "", ""))
    return text.getvalue()


def is_cell(cell: str, text: str) -> bool:
    """Whether a cell of a returned table holds the text; spreadsheets change white space."""
    return cell.split() in (_cell(text).split(), text.split())


def _cell(text: str) -> str:
    text = text.strip()
    return f"'{text}" if text.startswith((*FORMULA, "'")) else text


def _for_script(value: object) -> str:
    """JSON that is safe inside a script element: `<` and, for older browsers, two line separators are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
