"""What A and B are: rows of files and of runs, paired by prompt, or a message that says what does not match."""

import gzip
import json

import pytest

from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import (
    Answer,
    Pair,
    Prompt,
    as_text,
    check_answer_columns,
    find_answers,
    match,
    read_answers,
    read_prompts,
)


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "?"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_strings_or_conversations_and_may_be_empty(tmp_path, name):
    rows = [
        {"prompt": "p", "response": "", "kind": "x", "score": 1.0},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}]},
        {"prompt": TURNS, "response": "s", "kind": 3},
    ]
    path = write(tmp_path / name, rows)
    third = "User: Hi\n\nAssistant: Hello\n\nUser: ?"
    assert read_answers(path, "kind") == [Answer("p", "", "x"), Answer("q", "r"), Answer(third, "s", "3")]
    assert read_prompts(path, "kind")[2] == Prompt(third, TURNS, "3")
    assert as_text(TURNS[1:2]) == "Assistant: Hello"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p"}, "rows.jsonl:2: an answer has the fields prompt and response"),
        ({"response": "p"}, "rows.jsonl:2: the row has no field 'prompt'"),
        ({"prompt": "p", "response": 3}, "rows.jsonl:2: field 'response' must be a string"),
        ({"prompt": "p", "response": []}, "rows.jsonl:2: field 'response' is an empty conversation"),
        (
            {"prompt": "p", "response": TURNS},
            ":2: field 'response' must end with .* assistant.*, not with user",
        ),
        (
            {"prompt": "p", "response": "r", "category": "\ud800"},
            ":2: field 'category' holds half a surrogate",
        ),
        ({"prompt": "p", "response": "r", "category": ["x"]}, "rows.jsonl:2: field 'category' must be a string"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, row, says):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}, row])
    with pytest.raises(UserError, match=says):
        read_answers(path)


def test_a_file_without_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [])
    for read in (read_answers, read_prompts):
        with pytest.raises(UserError, match="holds no rows"):
            read(path)


def test_answers_are_taken_from_other_columns(tmp_path):
    rows = [{"question": "p", "response": "r", "completion": "c", "other": "o"}]
    path = write(tmp_path / "rows.jsonl", rows)
    columns = (("prompt", "question"), ("response", "other"))
    assert read_answers(path, columns=columns) == [Answer("p", "o")]
    assert read_answers(path, columns=(("prompt", "question"), ("completion", "other"))) == [Answer("p", "o")]
    with pytest.raises(UserError, match=r"data\.columns\.prompt=NAME"):
        read_answers(path)
    check_answer_columns([path], "category", columns)
    for wrong, says in (("respones", r"no such field.*response"), ("shown", "no column 'x'")):
        with pytest.raises(UserError, match=says):
            check_answer_columns([path], "category", ((wrong, "x"),))


def test_what_a_path_names(tmp_path):
    run = tmp_path / "runs" / "mpo"
    (run / "evaluate").mkdir(parents=True)
    assert find_answers(str(run)) is None  # any folder may be a model
    (run / "env.json").write_text("{}")
    with pytest.raises(UserError, match="no finished evaluation"):
        find_answers(str(run))
    samples = write(run / "evaluate" / "samples.jsonl", [{"prompt": "p", "response": "r"}])
    assert find_answers(str(run)) == find_answers(str(run / "evaluate")) == samples
    assert find_answers(str(tmp_path)) == samples  # the workdir's only run
    (tmp_path / "runs" / "sft" / "evaluate").mkdir(parents=True)
    assert find_answers(str(tmp_path)) == samples
    write(tmp_path / "runs" / "sft" / "evaluate" / "samples.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(UserError, match=r"holds several runs: name one of .*runs/mpo, .*runs/sft"):
        find_answers(str(tmp_path))
    assert find_answers("no/such/rows.parquet") == "no/such/rows.parquet"
    assert find_answers("org/name") is None


A = [Answer("x", "a1", "k"), Answer("y", "a2"), Answer("x", "a3")]
B = [Answer("x", "b1"), Answer("x", "b2"), Answer("y", "b3", "m")]


def test_pairs_meet_by_prompt_and_by_turn():
    pairs = [Pair("x", "a1", "b1", "k"), Pair("y", "a2", "b3", "m"), Pair("x", "a3", "b2", None)]
    assert match(A, B, ("a", "b")) == pairs
    assert match(A, B, ("a", "b"), [Prompt("y", "y", None), Prompt("x", "x", None)]) == [pairs[1], pairs[0]]


@pytest.mark.parametrize(
    ("a", "b", "prompts", "says"),
    [
        (A[:2], B, None, r"first has no answer to 1 of the 3 prompts of second, first 'x'"),
        (A, B[:2], None, r"second has no answer to 1 of the 3 prompts of first, first 'y'"),
        (A, B, [Prompt("z", "z", None)], r"first has no answer to 1 of the 1 prompts of --data, first 'z'; second has"),
        ([Answer("x", "a", "k")], [Answer("x", "b", "l")], None, "has the categories k, l"),
    ],
)
def test_what_does_not_match_is_named(a, b, prompts, says):
    with pytest.raises(UserError, match=says):
        match(a, b, ("first", "second"), prompts)
