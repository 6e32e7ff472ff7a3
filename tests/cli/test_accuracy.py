"""`mpo accuracy`: a reward model and an implicit reward against `mpo score`, and what is refused before it starts."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import write_model
from tests.cli.test_score import CHOSEN, NO_CACHE, PROMPTS, REJECTED, lines
from tests.pipeline.test_pipeline import mpo

REWARD_BENCH = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-hard": 95, "alpacaeval-length": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
                  "llmbar-adver-neighbor": 134, "llmbar-natural": 100, "mt-bench-hard": 37},
    "Safety": {"donotanswer": 136, "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250},
    "Reasoning": {"math-prm": 984, **{f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")}},
}  # fmt: skip
"""Its rows by subset, and 984 in place of the 447 of math-prm: rewardbench/constants.py, 0.1.5 of January 2026."""
SUBSETS = ["mt-bench-easy", "mt-bench-easy", "llmbar-natural", "hep-go", "other"]


@pytest.fixture
def pairs(tmp_path):
    fields = zip(PROMPTS, CHOSEN, REJECTED, SUBSETS, strict=True)
    rows = [{"prompt": p, "chosen": c, "rejected": r, "subset": s, "kind": len(p) // 10} for p, c, r, s in fields]
    rows[2]["rejected"] = rows[2]["chosen"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def margins(model, pairs, out, field) -> np.ndarray:
    assert mpo("score", model, pairs, "--out", out, *NO_CACHE) == 0
    return np.asarray([row[f"{field}_chosen"] - row[f"{field}_rejected"] for row in lines(out)])


def test_rows_that_number_their_better_response(reward_model, pairs, tmp_path, capsys):
    """PKU-SafeRLHF's, in accuracy and score as in runs."""
    given, numbered = lines(pairs), tmp_path / "numbered.jsonl"
    rows = []
    for number, row in enumerate(given):
        sides = (row["chosen"], row["rejected"])[:: 1 if number % 2 == 0 else -1]
        texts = {f"response_{n}": text for n, text in enumerate(sides)}
        rows.append({"prompt": row["prompt"], **texts, "better_response_id": number % 2})
    numbered.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [margins(reward_model, path, tmp_path / "out.jsonl", "score") for path in (pairs, numbered)]
    assert np.array_equal(*found) and f"scored by the reward model {reward_model}" in capsys.readouterr().out
    assert mpo("accuracy", reward_model, numbered, "--json", tmp_path / "a.json", *NO_CACHE) == 0
    assert json.loads((tmp_path / "a.json").read_text())["overall"]["mean"] == ((1 + np.sign(found[0])) / 2).mean()
    rows[1]["better_response_id"] = None
    numbered.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mpo("accuracy", reward_model, numbered, *NO_CACHE) == 2
    assert "numbered.jsonl:2: better_response_id is null, so the row is no pair" in capsys.readouterr().err


def test_a_reward_model(reward_model, pairs, tmp_path, capsys):
    out = tmp_path / "accuracy.json"
    assert mpo("accuracy", reward_model, pairs, "--by", "kind", "--json", out, *NO_CACHE) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    margin = margins(reward_model, pairs, tmp_path / "scores.jsonl", "score")
    right = (1 + np.sign(margin)) / 2
    assert right[2] == 0.5 and found["overall"]["ties"] == 1 and found["overall"]["rows"] == 5
    assert found["overall"]["mean"] == pytest.approx(right.mean())
    assert found["overall"]["margin"] == pytest.approx(margin.mean(), rel=1e-5)
    longer = [(1 + np.sign(len(row["chosen"]) - len(row["rejected"]))) / 2 for row in lines(pairs)]
    assert found["longer"]["mean"] == np.mean(longer) and found["longer"]["ties"] == longer.count(0.5)
    assert f"Choosing the longer response, in characters, is right in {np.mean(longer):.1%} of all rows" in said
    kinds = np.asarray([len(p) // 10 for p in PROMPTS])
    assert {name: one["mean"] for name, one in found["groups"].items()} == {
        str(kind): pytest.approx(right[kinds == kind].mean()) for kind in sorted(set(kinds))
    }
    sections = {name: one["mean"] for name, one in found["bench"]["sections"].items()}
    assert sections == pytest.approx({"Chat": right[:2].mean(), "Chat Hard": 0.5, "Reasoning": right[3]})
    assert found["beta"] is None and found["bench"]["score"] is None and found["bench"]["unknown"] == 1
    assert "Ties count half" in said and "Chat Hard" in said and "rows of no subset of RewardBench" in said


def test_a_file_of_the_benchmark_s_shape(decoder, tmp_path, capsys):
    """Parquet with its columns and its 23 subsets, two rows each, against its own way of adding up."""
    subsets = [name for names in REWARD_BENCH.values() for name in names for _ in range(2)]
    sides = [(CHOSEN[0], CHOSEN[0]) if n % 9 == 0 else (CHOSEN[n * 7 % 5], REJECTED[n * 3 % 5]) for n in range(46)]
    rows = [
        {"prompt": PROMPTS[n % 5], "chosen": sides[n][0], "chosen_model": None if n % 2 else "human",
         "rejected": sides[n][1], "rejected_model": "gpt", "subset": subset, "id": n}
        for n, subset in enumerate(subsets)
    ]  # fmt: skip
    data, out = tmp_path / "filtered-00000-of-00001.parquet", tmp_path / "accuracy.json"
    pq.write_table(pa.Table.from_pylist(rows[::-1]), data)
    model = write_model(tmp_path / "model", decoder, head="value", chat=True)
    given = ("--by", "subset", "--json", out, "text.chat=true", *NO_CACHE)
    assert mpo("accuracy", model, data, *given) == 0
    found = json.loads(out.read_text())
    of_subset = {name: one["mean"] for name, one in found["groups"].items()}
    assert len(of_subset) == 23 and len(set(of_subset.values())) > 1
    assert found["bench"]["missing"] == [] and found["bench"]["unknown"] == 0
    sections = {
        section: sum(of_subset[name] * rows for name, rows in names.items()) / sum(names.values())
        for section, names in REWARD_BENCH.items()
    }
    assert {name: one["mean"] for name, one in found["bench"]["sections"].items()} == pytest.approx(sections)
    assert found["bench"]["score"]["mean"] == pytest.approx(sum(sections.values()) / 4)
    # pairs of equal texts tie
    assert found["overall"]["ties"] > 0 and found["bench"]["without_ties"] < found["bench"]["score"]["mean"]
    assert "RewardBench's own code counts a tie as wrong" in capsys.readouterr().out


def test_an_implicit_reward(language_model, decoder, pairs, tmp_path):
    other, out = write_model(tmp_path / "other", decoder, seed=7), tmp_path / "accuracy.json"
    given = ("--reference", other, "--beta", "0.5", "--json", out)
    assert mpo("accuracy", language_model, pairs, *given, *NO_CACHE) == 0
    ours, theirs = (margins(m, pairs, tmp_path / f"{n}.jsonl", "logp") for n, m in enumerate((language_model, other)))
    found = json.loads(out.read_text())["overall"]
    assert found["margin"] == pytest.approx(0.5 * (ours - theirs).mean(), rel=1e-4)
    assert found["mean"] == pytest.approx(((1 + np.sign(ours - theirs)) / 2).mean())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("language_model", (), "is a language model: give --reference MODEL"),
        ("reward_model", ("--reference", "LM"), "whose scores need no --reference"),
        ("reward_model", ("--beta", "0.1"), "--beta is of an implicit reward"),
        ("language_model", ("--reference", "RM"), "is a reward model: name a language model"),
        ("language_model", ("--reference", "LM", "--beta", "inf"), "--beta inf: give a finite number"),
        ("reward_model", ("--by", "nothing"), "has the field --by nothing"),
        ("reward_model", ("--by", "chosen_list"), "pairs.jsonl:1: field 'chosen_list' must be a string"),
        ("reward_model", ("--json", "DATA"), "is the file that is read"),
    ],
)
def test_what_is_refused(model, options, words, request, pairs, tmp_path, capsys):
    rows = [{**row, "chosen_list": [1]} for row in lines(pairs)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"LM": "language_model", "RM": "reward_model"}
    given = [request.getfixturevalue(named[o]) if o in named else pairs if o == "DATA" else o for o in options]
    assert mpo("accuracy", request.getfixturevalue(model), pairs, *given, *NO_CACHE) == 2
    assert words in capsys.readouterr().err


def test_rows_that_are_no_pairs_are_refused(reward_model, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p", "response": "r"}\n')
    assert mpo("accuracy", reward_model, data, *NO_CACHE) == 2
    assert "rows.jsonl:1: accuracy is of pairs" in capsys.readouterr().err
    data.write_text("")
    assert mpo("accuracy", reward_model, data, *NO_CACHE) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_score_never_writes_over_what_it_reads(pairs, tmp_path, capsys):
    before = pairs.read_text()
    (tmp_path / "link.jsonl").symlink_to(pairs)
    for out in (pairs, tmp_path / "link.jsonl", tmp_path / "." / "pairs.jsonl"):
        assert mpo("score", "no/such/model", pairs, "--out", out) == 2
        assert "is the file that is read: name another" in capsys.readouterr().err
    assert mpo("score", "no/such/model", pairs, "--out", tmp_path) == 2
    assert "is a folder: name a file" in capsys.readouterr().err
    assert mpo("score", "no/such/model", pairs, "--out", pairs / "scores.jsonl") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert pairs.read_text() == before


def test_columns_of_other_names_and_end_markers(reward_model, pairs, tmp_path, capsys):
    renamed, found = tmp_path / "renamed.jsonl", []
    rows = [{"good" if key == "chosen" else key: value for key, value in row.items()} for row in lines(pairs)]
    renamed.write_text("".join(json.dumps({**row, "good": f"{row['good']}<eos>"}) + "\n" for row in rows))
    assert mpo("accuracy", reward_model, renamed, *NO_CACHE) == 2
    assert "data.columns.chosen=NAME" in capsys.readouterr().err
    for data, more in ((pairs, ()), (renamed, ("data.columns.chosen=good",))):
        assert mpo("accuracy", reward_model, data, "--json", tmp_path / "a.json", *more, *NO_CACHE) == 0
        found.append(json.loads((tmp_path / "a.json").read_text()))
    assert found[0]["overall"] == found[1]["overall"] and found[0]["bench"] == found[1]["bench"]
    assert found[0]["stripped"] is None and found[1]["stripped"].startswith("5 responses end with")


def test_groups_called_as_the_table_s_own_rows_stay_apart(reward_model, pairs, tmp_path, capsys):
    names = ["all", "(none)", None, "all", "x"]
    rows = [{**row, "kind": name} for row, name in zip(lines(pairs), names, strict=True)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "accuracy.json"
    assert mpo("accuracy", reward_model, pairs, "--by", "kind", "--json", out, *NO_CACHE) == 0
    found = json.loads(out.read_text())
    counts = {name: group["rows"] for name, group in found["groups"].items()}
    assert counts == {"all": 2, "(none)": 1, "((none))": 1, "x": 1} and found["overall"]["rows"] == 5
    assert "(all)" in capsys.readouterr().out
