"""Which items are drawn and where A stands: by seed, balanced, and told by the key alone."""

import csv
import io
import json
from collections import Counter

import pytest

from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import Pair
from mpo_jax.runtime.files import write_json
from mpo_jax.tools.human import export
from mpo_jax.tools.human.sheets import make_study, read_key
from tests.tools.human.studies import NAMES, pairs, study


def test_n_of_each_category_balanced_and_shuffled():
    found = make_study(pairs(60), NAMES, n=11, by="category", seed=3)
    assert [item.number for item in found.items] == list(range(1, 23))
    assert Counter(item.category for item in found.items) == {"help": 11, "harm": 11}
    for category in ("help", "harm"):
        left = [item.a_is for item in found.items if item.category == category].count("left")
        assert left in (5, 6)
    assert len({(item.prompt, item.left, item.right) for item in found.items}) == 22
    for item in found.items:
        a, b = (item.left, item.right) if item.a_is == "left" else (item.right, item.left)
        assert "alpha" in a and b.startswith("beta")
        assert item.prompt.split()[-1] == a.split()[-1] == b.split()[-1]
    # neither categories nor sides stand in a row
    assert len({item.category for item in found.items[:11]}) == 2
    assert [item.a_is for item in found.items] != sorted(item.a_is for item in found.items)


def test_a_prompt_that_was_cut_has_a_mark_where():
    long = "Once upon a time there was a long prompt. What then?"
    seen = {"cut": " prompt. What then?", "whole": None, "templated": f"<user>{long}<assistant>"}
    given = [Pair(long, "a", "b", name, shown) for name, shown in seen.items()]
    made = make_study(given, NAMES, n=None, by="category", seed=0)
    assert {item.category: item.prompt for item in made.items} == {
        "cut": "[\N{HORIZONTAL ELLIPSIS}] prompt. What then?", "whole": long, "templated": seen["templated"]
    }  # fmt: skip


def test_the_seed_alone_decides():
    assert study(seed=1) == study(seed=1)
    assert study(seed=1).id != study(seed=2).id
    sides = {tuple(item.a_is for item in study(seed=seed).items) for seed in range(10)}
    assert len(sides) == 10
    without = make_study(pairs(9), NAMES, n=4, by=None, seed=0)
    assert len(without.items) == 4 and len(make_study(pairs(9), NAMES, n=None, by=None, seed=0).items) == 9


def test_mistakes():
    with pytest.raises(UserError, match=r"--n 31 is more than there are \(help: 30, harm: 30\)"):
        make_study(pairs(60), NAMES, n=31, by="category", seed=0)
    with pytest.raises(UserError, match="1 of 3 pairs have no field 'kind'"):
        make_study([*pairs(2), Pair("p", "a", "b")], NAMES, n=1, by="kind", seed=0)


def test_the_key_comes_back_and_a_changed_one_does_not(tmp_path):
    path = tmp_path / "key.json"
    write_json(path, study().to_dict())
    assert read_key(path) == study()
    key = json.loads(path.read_text())
    changed = {**key, "items": [{**key["items"][0], "left": "other"}, *key["items"][1:]]}
    for text in (json.dumps(changed), json.dumps({**key, "items": []}), "{}", "no json", "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"key\.json"):
            read_key(path)
    with pytest.raises(UserError, match=r"no key .*--key FILE"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize("change", ["a side", "all sides", "the names", "a category"])
def test_a_key_with_other_sides_is_refused(tmp_path, change):
    """The sheets' texts are as before, so that the study's id says nothing."""
    path = export.write_study(study(), tmp_path)
    key = json.loads(path.read_text())
    other = {"left": "right", "right": "left"}
    if change == "the names":
        key["a"], key["b"] = key["b"], key["a"]
    elif change == "a category":
        key["items"][0]["category"] = "other"
    else:
        for item in key["items"][: 1 if change == "a side" else None]:
            item["a_is"] = other[item["a_is"]]
    path.write_text(json.dumps(key))
    with pytest.raises(UserError, match="was changed after it was written"):
        read_key(path)
    # a key of an earlier version has no checksum
    before = {name: value for name, value in study().to_dict().items() if name != "sha256"}
    path.write_text(json.dumps(before))
    assert read_key(path) == study()


def test_sheets_say_nothing_of_sides():
    """Two studies that differ in the names alone have the very same sheets."""
    rows = pairs(categories=("kindness", "sharpness"))
    one, other = (make_study(rows, names, n=None, by="category", seed=0) for names in (NAMES, ("x", "y")))
    for write in (export.page, export.table):
        text = write(one)
        assert text == write(other)
        for secret in (*NAMES, "secret", "a_is", "category", "kindness", "sharpness"):
            assert secret not in text


def test_the_table_holds_the_texts_and_no_formula():
    rows = list(csv.DictReader(io.StringIO(export.table(study()), newline="")))
    assert [row["item"] for row in rows] == [str(n) for n in range(1, 13)]
    assert {row["study"] for row in rows} == {study().id} and {row["choice"] for row in rows} == {""}
    for row, item in zip(rows, study().items, strict=True):
        for column in ("prompt", "left", "right"):
            text = getattr(item, column)
            assert row[column] in (text, f"'{text}") and not row[column].startswith(export.FORMULA)
            assert export.is_cell(row[column], text)
            assert export.is_cell(row[column].replace("\n", "\r\n"), text) and not export.is_cell(
                row[column] + "!", text
            )


def test_nothing_in_the_page_ends_its_script():
    text = export.page(study())
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "\u2028" not in text and "<img" not in text
    data = text.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    shown = json.loads(data)
    assert [i["left"] for i in shown["items"]] == [item.left for item in study().items]
    assert shown.keys() == {"study", "items"} and shown["items"][0].keys() == {"item", "prompt", "left", "right"}
    # nothing is loaded, and nothing may be
    assert "http" not in text.replace("http-equiv", "").replace(data, "") and "default-src 'none'" in text
