"""What judges and people left in a workdir stands in Tables 4 and 5, and what they cannot have written is refused."""

import json
from pathlib import Path

import pytest

from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import Pair
from mpo_jax.evaluation.verdicts import OUTCOMES
from mpo_jax.runtime.files import write_json
from mpo_jax.tools.human.agreement import import_sheets, summary
from mpo_jax.tools.human.importing import Sheet
from mpo_jax.tools.human.sheets import Choice, Item, make_study
from mpo_jax.tools.judge import verdict
from mpo_jax.tools.report.markdown import cell
from mpo_jax.tools.report.page import write_report
from mpo_jax.tools.report.paper_tables import human, judged
from mpo_jax.tools.report.seeds import collect_seeds
from mpo_jax.tools.report.verdict_rows import Verdicts, find_verdicts, side_name
from tests.tools.report import workdirs

A, B = "runs/x/seed-1/runs/mpo", "runs/x/seed-1/runs/ppo"
PAIRS = [Pair(f"prompt {n}", f"one {n}", f"other {n}", "helpful" if n < 4 else "harmless") for n in range(8)]


def judge(folder: Path) -> None:
    """A wins the first five pairs, ties in the sixth, loses the seventh, and the last has no verdict."""
    totals = [(8.0, 7.0)] * 5 + [(6.0, 6.0), (4.0, 5.0)]
    found = [verdict.Judged(pair, (verdict.Grade(False, t),)) for pair, t in zip(PAIRS, totals, strict=False)]
    found.append(verdict.Judged(PAIRS[7], (verdict.Grade(False, None, "unparsed", "no idea"),)))
    write_json(
        folder / "result.json", {"a": A, "b": B, "judge": "some-model", **verdict.summary(found, resamples=20, seed=0)}
    )


def study(folder: Path) -> None:
    """Three people who all prefer A on every helpful prompt, and see a tie in every harmless one."""
    made = make_study(PAIRS, (A, B), n=None, by=None, seed=3)
    write_json(folder / "key.json", made.to_dict())
    files = []
    for name in ("Ann", "Bob", "Cy"):
        choices = {i.number: i.a_is if i.category == "helpful" else "tie" for i in made.items}
        files.append(folder / f"{name}.json")
        write_json(files[-1], {"format": 1, "study": made.id, "annotator": name, "choices": choices})
    import_sheets(files, key=folder / "key.json")


def test_results_in_the_workdir_stand_beside_the_paper_s(tmp_path: Path) -> None:
    judge(tmp_path / "judge" / "mpo-ppo")
    study(tmp_path / "human")
    found = find_verdicts(tmp_path)
    ours = [row for row in judged({}, found).rows if row["of"] == "ours"]
    assert [(row["category"], row["items"], row["unparsed"]) for row in ours if row["category"] is None] == [
        (None, 7, 1)
    ]
    assert {row["category"]: (row["items"], row["win"]) for row in ours} == {
        None: (7, 5 / 7), "harmless": (3, 1 / 3), "helpful": (4, 1.0),
    }  # fmt: skip
    # Wilson's interval of 5 of 7
    assert (ours[0]["win_low"], ours[0]["win_high"]) == pytest.approx((0.3589, 0.9178), abs=1e-4)
    assert (ours[0]["a"], ours[0]["b"], ours[0]["judge"]) == ("mpo, seed-1", "ppo, seed-1", "some-model")

    people = {row["category"]: row for row in human(found).rows if row["of"] == "ours"}
    assert {name: (row["win"], row["tie"], row["people"], row["fleiss_kappa"]) for name, row in people.items()} == {
        None: (0.5, 0.5, 3, 1.0), "helpful": (1.0, 0.0, 3, 1.0), "harmless": (0.0, 1.0, 3, 1.0),
    }  # fmt: skip
    assert people[None]["agreement"] == "almost perfect"


def test_table_5_has_the_shares_of_votes_beside_those_of_items(tmp_path: Path) -> None:
    """Two of three people prefer A on every helpful prompt: two thirds of the votes, and all of the items."""
    made = make_study(PAIRS, (A, B), n=None, by=None, seed=3)
    sheets = []
    for name in ("Ann", "Bob", "Cy"):

        def choice(item: Item, name: str = name) -> Choice:
            return item.a_is if item.category == "helpful" and name != "Cy" else "tie"

        sheets.append(Sheet(tmp_path / name, name, {item.number: choice(item) for item in made.items}))
    result = {"a": A, "b": B, **summary(made, sheets, resamples=20, seed=0)}
    rows = human(Verdicts(human={tmp_path: result})).rows
    ours = {row["category"]: (row["votes"], row["votes_win"], row["win"]) for row in rows if row["of"] == "ours"}
    assert ours == {None: (24, 8 / 24, 0.5), "helpful": (12, 8 / 12, 1.0), "harmless": (12, 0.0, 0.0)}
    theirs = next(row for row in rows if row["of"] == "paper")
    # 62.0%, 19.3% and 18.7% of three people's votes on 50 items
    assert (theirs["category"], theirs["votes"], "win" in theirs) == ("helpful", 150, False)
    assert [cell(f"votes_{o}", theirs[f"votes_{o}"]) for o in OUTCOMES] == ["62.0%", "19.3%", "18.7%"]
    # studies from before votes were counted by category
    del result["votes_by_category"]
    old = human(Verdicts(human={tmp_path: result})).rows
    assert [("votes" in row) for row in old if row["of"] == "ours"] == [True, False, False]


def test_the_report_shows_them(tmp_path: Path) -> None:
    workdir = workdirs.make(tmp_path / "w", ("sft", "dpo"))
    judge(workdir / "judge")
    page = write_report(workdir, resamples=10).read_text(encoding="utf-8")
    assert "some-model" in page and "mpo, seed-1" in page and "71.4%" in page
    lines = (workdir / "report" / "tables" / "table4.csv").read_text().splitlines()
    assert any("some-model" in line and "0.714" in line for line in lines)


def test_without_any_the_tables_are_the_paper_s_and_the_runs_own(tmp_path: Path) -> None:
    by_seed = collect_seeds(workdirs.make(tmp_path / "w", ("sft", "dpo", "mpo")))
    assert find_verdicts(tmp_path / "w") == Verdicts()
    assert {row["of"] for row in judged(by_seed, Verdicts()).rows} == {"paper"}  # MPO has no PPO beside it
    assert human(Verdicts()).rows[-1] == {"of": "ours", "win": None}


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": "x", "b": "y", "verdict": {"rates": {"win": null}}}'])
def test_another_file_is_named_and_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "judge" / "x" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(UserError, match=r"judge.x.result\.json: no result"):
        find_verdicts(tmp_path)
    with pytest.raises(UserError, match="no result"):
        write_report(workdirs.make(tmp_path), resamples=10)


def test_a_study_s_result_is_none_of_a_judge(tmp_path: Path) -> None:
    study(tmp_path / "human")
    (tmp_path / "human").rename(tmp_path / "judge")
    with pytest.raises(UserError, match="no result of mpo judge"):
        find_verdicts(tmp_path)
    assert "judge" not in json.loads((tmp_path / "judge" / "result.json").read_text())


def test_sides_by_their_runs() -> None:
    assert [side_name(path) for path in (A, "runs/x/runs/dpo", "answers.jsonl", "org/model", "/m/runs/dpo/")] == [
        "mpo, seed-1", "dpo", "answers.jsonl", "org/model", "dpo",
    ]  # fmt: skip
