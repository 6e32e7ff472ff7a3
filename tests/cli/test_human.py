"""`mpo human export` and `import`: from two files to sheets, and from filled sheets to a verdict."""

import csv
import json

import pytest

from mpo_jax.tools.human.sheets import read_key
from tests.cli.test_score import NO_CACHE
from tests.pipeline.test_pipeline import mpo

CATEGORIES = ("help", "harm")


@pytest.fixture
def sides(tmp_path):
    for name in "ab":
        rows = [{"prompt": f"p{n}", "response": f"{name}{n}", "category": CATEGORIES[n % 2]} for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def exported(sides, folder, *flags):
    assert mpo("human", "export", *sides, "--n", "4", "--by", "category", "--out", folder, *flags) == 0
    return read_key(folder / "key.json")


def fill(folder, study, name, choose):
    """A filled page's file, or a filled table for names that end in .csv."""
    choices = {item.number: choose(item) for item in study.items}
    path = folder / name
    if not name.endswith(".csv"):
        path.write_text(json.dumps({"study": study.id, "annotator": name.split(".")[0], "choices": choices}))
        return path
    with (folder / "sheets" / "study.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = [{**row, "choice": choices[int(row["item"])]} for row in csv.DictReader(file)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_study_there_and_back(sides, tmp_path, capsys):
    study = exported(sides, tmp_path / "s")
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"key.json", "sheets"}
    assert {path.name for path in (tmp_path / "s" / "sheets").iterdir()} == {"study.html", "study.csv"}
    assert "8 items (harm 4, help 4)" in capsys.readouterr().out

    def by_text(item):  # all prefer A's answers to "help" and find the others equal
        return item.a_is if item.category == "help" else "tie"

    def contrary(item):
        return "right" if by_text(item) == "left" else "left"

    files = [fill(tmp_path / "s", study, name, by_text) for name in ("ann.json", "bob.csv")]
    files.append(fill(tmp_path / "s", study, "cy.json", contrary))
    assert mpo("human", "import", *files, "--key", tmp_path / "s" / "key.json") == 0
    result = json.loads((tmp_path / "s" / "result.json").read_text())
    assert [result["by_category"]["help"][k] for k in ("win", "tie", "lose")] == [4, 0, 0]
    assert [result["by_category"]["harm"][k] for k in ("win", "tie", "lose")] == [0, 4, 0]
    assert result["sheets"].keys() == {"ann", "bob", "cy"} and result["annotators"] == 3
    rows = [json.loads(line) for line in (tmp_path / "s" / "votes.jsonl").read_text().splitlines()]
    assert all(row["votes"]["ann"] == row["votes"]["bob"] == row["outcome"] != row["votes"]["cy"] for row in rows)
    shown = capsys.readouterr().out
    assert "Fleiss' kappa, all:" in shown and "50.0% [21.5%, 78.5%]" in shown and "too few" not in shown
    assert mpo("human", "import", files[0], "--key", tmp_path / "s" / "key.json", "--out", tmp_path / "other") == 0
    assert "too few for a majority" in capsys.readouterr().out and (tmp_path / "other" / "result.json").is_file()


def test_the_same_export_again_and_another_in_its_place(sides, tmp_path, capsys):
    first = exported(sides, tmp_path / "s")
    page = (tmp_path / "s" / "sheets" / "study.html").read_bytes()
    assert exported(sides, tmp_path / "s") == first
    assert (tmp_path / "s" / "sheets" / "study.html").read_bytes() == page
    other = ("human", "export", *sides, "--n", "4", "--by", "category", "--out", tmp_path / "s", "--seed", "1")
    assert mpo(*other) == 2
    assert "is the key of another study" in capsys.readouterr().err and read_key(tmp_path / "s" / "key.json") == first


def test_mistakes(sides, tmp_path, capsys, reward_model):
    study = exported(sides, tmp_path / "s")
    half = tmp_path / "half.json"
    half.write_text(json.dumps({"study": study.id, "annotator": "x", "choices": {"1": "tie"}}))
    key = ("--key", tmp_path / "s" / "key.json")
    for arguments, says in (
        (("import", half, *key), "half.json: 7 of 8 items have no choice: 2, 3, 4, 5, 6, 7, 8"),
        (("import", tmp_path / "none.json", *key), "none.json: cannot read the file"),
        (("import", half, "--key", half), "is no key of a study"),
        (("import", half, "--key", tmp_path / "none"), "no key"),
        (("export", *sides, "--n", "11", "--by", "category", "--out", tmp_path / "t"), "--n 11 is more than there are"),
        (("export", *sides, "--by", "kind", "--out", tmp_path / "t"), "20 of 20 pairs have no field 'kind'"),
        (("export", sides[0], reward_model, "--out", tmp_path / "t", *NO_CACHE), "--data FILE"),
    ):
        assert mpo("human", *arguments) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "t").exists() and not (tmp_path / "s" / "result.json").exists()


def test_the_prompts_to_compare_on_may_have_another_column(sides, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"question": f"p{n}"}) + "\n" for n in (3, 5)))
    given = ("human", "export", *sides, "--data", tmp_path / "asked.jsonl", "--out", tmp_path / "s")
    assert mpo(*given) == 2
    assert "data.columns.prompt=NAME takes it from another column" in capsys.readouterr().err
    assert mpo(*given, "data.columns.prompt=question") == 0
    assert {item.prompt for item in read_key(tmp_path / "s" / "key.json").items} == {"p3", "p5"}
