"""Sheets that come back are whole and of this study, or the message says what is wrong with which."""

import csv
import io
import json

import numpy as np
import pytest

from mpo_jax.errors import UserError
from mpo_jax.tools.human import export
from mpo_jax.tools.human.agreement import summary
from mpo_jax.tools.human.importing import Sheet, read_sheet, read_sheets
from tests.tools.human.studies import choose_a, study

STUDY = study()
CHOICES = {item.number: ("left", "right", "tie")[item.number % 3] for item in STUDY.items}


def saved(path, annotator="Ann", choices=CHOICES, **more):
    found = {"format": 1, "study": STUDY.id, "annotator": annotator, "choices": choices, **more}
    path.write_text(json.dumps(found))
    return path


def rows():
    found = list(csv.DictReader(io.StringIO(export.table(STUDY), newline="")))
    return [{**row, "choice": CHOICES[int(row["item"])]} for row in found]


def table(path, rows, delimiter=",", encoding="utf-8-sig"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_page_s_file_and_the_table_say_the_same(tmp_path):
    page = read_sheet(saved(tmp_path / "page.json"), STUDY)
    assert page == Sheet(tmp_path / "page.json", "Ann", CHOICES)
    plain = read_sheet(table(tmp_path / "Bob.csv", rows()), STUDY)
    assert plain.choices == CHOICES and plain.annotator == "Bob"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_spreadsheets_do_to_a_table(tmp_path, delimiter):
    """Other delimiters, line ends and order, columns of one's own, an empty row, capitals."""
    changed = [
        {k: v.replace("\n", "\r\n").replace("'=", "=") for k, v in row.items()}
        | {"choice": f" {row['choice'].upper()} ", "annotator": "Cy", "notes": "x"}
        for row in reversed(rows())
    ]
    changed.insert(3, dict.fromkeys(changed[0], ""))
    found = read_sheet(table(tmp_path / "t.csv", changed, delimiter, "utf-8"), STUDY)
    assert found.choices == CHOICES and found.annotator == "Cy"


def but(number, **cells):
    return [{**row, **cells} if row["item"] == str(number) else row for row in rows()]


def sorted_alone():
    """What a spreadsheet leaves when one column is sorted without the others."""
    items = sorted((row["item"] for row in rows()), reverse=True)
    return [{**row, "item": item} for row, item in zip(rows(), items, strict=True)]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (but(3, choice=""), "1 of 12 items have no choice: 3. Open the page"),
        ([row for row in rows() if row["item"] not in ("2", "5")], "2 of 12 items have no choice: 2, 5"),
        (but(4, choice="links"), "item 4: a choice is left, right or tie, not 'links'"),
        (but(4, item="40"), "the study has no item 40"),
        (but(4, item="x"), "t.csv:.*'x' is no item's number"),
        ([*rows(), rows()[0]], "item 1 appears twice"),
        (sorted_alone(), "is not that of item 9: rows or cells were moved"),
        (but(5, left="other"), "column left is not that of item 5"),
        (but(6, study="0123456789ab"), "a sheet of study '0123456789ab', but the key is of"),
        ([{k: v for k, v in row.items() if k != "choice"} for row in rows()], "lacks the column choice"),
        ([{**row, "annotator": row["item"]} for row in rows()], "several annotators, 1, 10"),
    ],
)
def test_a_table_with_a_fault(tmp_path, changed, says):
    with pytest.raises(UserError, match=says):
        read_sheet(table(tmp_path / "t.csv", changed), STUDY)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no file that the study's page saved"),
        ("[]", "no file that the study's page saved"),
        ('{"study": "x", "annotator": "a"}', "no file that the study's page saved"),
        ('{"study": "x", "annotator": "a", "choices": {}}', "a sheet of study 'x'"),
        ('{"study": "ID", "annotator": "a", "choices": {"1": "left", "1": "right"}}', "stands twice"),
        ('{"study": "ID", "annotator": "a", "choices": {"1": "left"}}', "11 of 12 items have no choice: 2, 3"),
        ('{"study": "ID", "annotator": "a", "choices": {"1": null}}', "not 'None'"),
        ('{"study": "ID", "annotator": "a", "choices": {"99": "tie"}}', "no item 99"),
    ],
)
def test_a_page_s_file_with_a_fault(tmp_path, text, says):
    (tmp_path / "s.json").write_text(text.replace("ID", STUDY.id))
    with pytest.raises(UserError, match=says):
        read_sheet(tmp_path / "s.json", STUDY)


def test_all_faulty_files_are_named_at_once(tmp_path):
    files = [saved(tmp_path / "good.json"), saved(tmp_path / "half.json", choices={"1": "tie"}), tmp_path / "none.csv"]
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError) as caught:
        read_sheets([*files, tmp_path / "x.txt"], STUDY)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(name in line for name, line in zip(("half", "none", "x.txt"), lines, strict=True))


def test_one_person_has_one_sheet(tmp_path):
    with pytest.raises(UserError, match=r"a.json and .*b.json are both by 'ann'"):
        read_sheets([saved(tmp_path / "a.json"), saved(tmp_path / "b.json", "ann ")], STUDY)


def test_choices_are_unblinded_and_counted():
    """Two always choose A, wherever it stands, and one the left: A wins by two votes of three."""
    sheets = [
        Sheet(STUDY, name, {i.number: choose_a(STUDY, i.number) if name != "left" else "left" for i in STUDY.items})
        for name in ("one", "two", "left")
    ]
    found = summary(STUDY, sheets, resamples=50, seed=0)
    a_left = sum(item.a_is == "left" for item in STUDY.items)
    assert [found["verdict"][name] for name in ("win", "tie", "lose")] == [12, 0, 0]
    assert found["votes"] == {"win": 24 + a_left, "tie": 0, "lose": 12 - a_left}
    assert found["sides"] == {"left": 12 + 2 * a_left, "right": 2 * (12 - a_left)}
    assert {name: tally["win"] for name, tally in found["by_category"].items()} == {"harm": 6, "help": 6}
    # agreement of pairs of votes: 1 where A is left, 1/3 elsewhere; chance from the shares of all votes
    share = found["votes"]["win"] / 36
    chance = share**2 + (1 - share) ** 2
    agree = (a_left + (12 - a_left) / 3) / 12
    np.testing.assert_allclose(found["kappa"]["value"], (agree - chance) / (1 - chance))
    assert found["kappa_by_category"].keys() == {"harm", "help"}


def test_one_person_has_no_agreement():
    found = summary(STUDY, [Sheet(STUDY, "one", dict.fromkeys(CHOICES, "tie"))], resamples=50, seed=0)
    assert found["verdict"]["tie"] == 12 and "kappa" not in found
    two = [Sheet(STUDY, name, dict.fromkeys(CHOICES, "tie")) for name in "xy"]
    assert summary(STUDY, two, resamples=50, seed=0)["kappa"]["value"] == 1.0


def test_a_column_that_is_there_twice(tmp_path):
    """A reader by names would take the last one's choices."""
    path = table(tmp_path / "t.csv", rows())
    first, *rest = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    path.write_text("".join([first.replace("annotator", "choice"), *rest]))
    with pytest.raises(UserError, match="the column choice more than once: delete the wrong one"):
        read_sheet(path, STUDY)
