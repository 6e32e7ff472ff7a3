"""Import of filled sheets: every person's choice for each item, once each sheet is complete and of this study."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from mpo_jax.errors import UserError
from mpo_jax.tools.human.export import COLUMNS, is_cell
from mpo_jax.tools.human.sheets import CHOICES, Choice, Study
from mpo_jax.untrusted import loads, read_bytes, unrepeated

SHOWN = 8
"""The largest number of item numbers in a message."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A filled sheet: the choice for every item of a study, by number."""

    path: Path
    annotator: str
    choices: Mapping[int, Choice]


def read_sheets(paths: Sequence[Path], study: Study) -> list[Sheet]:
    """Sheets of several people.

    Raises:
      UserError: with all that is wrong in any of them, or if one person has filled two.
    """
    sheets, wrong = [], []
    for path in paths:
        try:
            sheets.append(read_sheet(path, study))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    by_name: dict[str, Path] = {}
    for sheet in sheets:
        name = sheet.annotator.casefold()
        if name in by_name:
            raise UserError(
                f"{by_name[name]} and {sheet.path} are both by {sheet.annotator!r}: give one sheet a person; where two "
                "people have one name, change it in one file"
            )
        by_name[name] = sheet.path
    return sheets


def read_sheet(path: Path, study: Study) -> Sheet:
    """A file that the page saved (.json), or a filled table (.csv).

    Raises:
      UserError: for a sheet of another study, for missing, unknown or repeated items, for texts of another item, or
        for invalid choices.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not UTF-8 text; save it as CSV UTF-8") from error
    if path.suffix.lower() == ".json":
        annotator, choices = _from_page(text, path, study)
    elif path.suffix.lower() == ".csv":
        annotator, choices = _from_table(text, path, study)
    else:
        raise UserError(f"{path}: a filled sheet is a .json file that the page saved, or a .csv table")
    numbers = {item.number for item in study.items}
    if unknown := choices.keys() - numbers:
        raise UserError(f"{path}: the study has no item {_some(unknown)}: give the sheet as it was saved")
    if wrong := {number for number, choice in choices.items() if choice and choice not in CHOICES}:
        first = min(wrong)
        raise UserError(
            f"{path}: item {_some(wrong)}: a choice is left, right or tie, not {choices[first][:20]!r}: correct it"
        )
    if missing := numbers - {number for number, choice in choices.items() if choice}:
        raise UserError(
            f"{path}: {len(missing)} of {len(numbers)} items have no choice: {_some(missing)}. Open the page, load the "
            "file and go on, or fill these rows of the table"
        )
    return Sheet(path, annotator, {number: cast(Choice, choice) for number, choice in sorted(choices.items())})


def _from_page(text: str, path: Path, study: Study) -> tuple[str, dict[int, str]]:
    try:
        found = loads(text, pairs=unrepeated)
        annotator = str(found["annotator"]).strip()
        choices = {int(number): str(choice).strip() for number, choice in found["choices"].items()}
        whose = str(found["study"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no file that the study's page saved, or one that was changed ({error})") from error
    _check_study(whose, path, study)
    return annotator or path.stem, choices


def _from_table(text: str, path: Path, study: Study) -> tuple[str, dict[int, str]]:
    header = text.partition("\n")[0]
    # in many locales spreadsheets write semicolons
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", restval="")
    lacking = [column for column in COLUMNS[:-1] if column not in (reader.fieldnames or ())]
    if twice := [column for column in COLUMNS if (reader.fieldnames or []).count(column) > 1]:
        # a reader by names would take the last one
        raise UserError(f"{path}: the table has the column {', '.join(twice)} more than once: delete the wrong one")
    if lacking:
        raise UserError(f"{path}: the table lacks the column {', '.join(lacking)}: its first line must name them")
    choices: dict[int, str] = {}
    names: set[str] = set()
    try:
        for row in reader:
            if any(row[column].strip() for column in COLUMNS[:-1]):
                number = _checked_row(row, f"{path}:{reader.line_num}", study)
                if number in choices:
                    raise UserError(f"{path}:{reader.line_num}: item {number} appears twice: keep one")
                choices[number] = row["choice"].strip().lower()
                names.add(row.get("annotator", "").strip())
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: no CSV that can be read: {error}") from error
    names.discard("")
    if len(names) > 1:
        raise UserError(f"{path}: several annotators, {', '.join(sorted(names))}: give each a table of their own")
    return (names.pop() if names else path.stem), choices


def _checked_row(row: Mapping[str, str], where: str, study: Study) -> int:
    """The row's item, checked against the texts beside it: sorting one column alone would mix up all choices."""
    _check_study(row["study"].strip(), where, study)
    try:
        number = int(row["item"])
    except ValueError:
        raise UserError(f"{where}: {row['item']!r} is no item's number: restore the column") from None
    for item in study.items:
        texts = {"prompt": item.prompt, "left": item.left, "right": item.right}
        changed = [column for column, text in texts.items() if item.number == number and not is_cell(row[column], text)]
        if changed:
            raise UserError(
                f"{where}: column {', '.join(changed)} is not that of item {number}: rows or cells were moved or "
                "changed. Start again from the table as it was exported, or restore these cells"
            )
    return number


def _check_study(found: str, where: Path | str, study: Study) -> None:
    if found != study.id:
        raise UserError(
            f"{where}: a sheet of study {found[:20]!r}, but the key is of {study.id}: name the other with --key"
        )


def _some(numbers: set[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:SHOWN])) + (f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else "")
