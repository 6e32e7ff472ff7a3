"""Rows {prompt, responses, scores}: which pair each becomes, and every row that is refused, with its line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.registry import ROW_FORMATS
from mpo_jax.config.schema import DataConfig
from mpo_jax.data.columns import check_columns
from mpo_jax.data.corpus import _format
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.scored import check_scores, read_scored
from mpo_jax.data.sources import open_source
from mpo_jax.errors import UserError

RENDER = Renderer(lambda: pytest.fail("no row needs a chat template"))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(responses: object, scores: object, **more: object) -> dict[str, object]:
    return {"prompt": "p", "responses": responses, "scores": scores, **more}


@pytest.mark.parametrize(
    ("scores", "chosen", "rejected"),
    [
        ([1, 2.5], "b", "a"),
        ([2, 1], "a", "b"),
        ([1.0, 1.0], "a", "b"),
        ([0.0, 3.0, -2.0, 1.0], "b", "c"),
        ([3, 1, 3, 1], "a", "d"),
        ([5, 5, 5], "a", "c"),
    ],
)
def test_best_against_worst(scores, chosen, rejected, tmp_path):
    letters = list("abcd")[: len(scores)]
    path = write(tmp_path / "rows.jsonl", row(letters, scores, category="code"))
    (pair,), report = read_scored(open_source(str(path)), render=RENDER)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.category) == ("p", chosen, rejected, "code")
    assert pair.scores == (max(scores), min(scores))
    assert (report.read, report.kept) == (1, 1)


def test_responses_continue_a_conversation(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    chat = SimpleNamespace(
        prompt=lambda turns: f"{len(turns)} turns",
        unwritten=lambda turns, shown: [],
        response=lambda turns, reply: f"{reply} after {turns[-1]['content']}",
    )
    path = write(tmp_path / "rows.jsonl", {"prompt": turns, "responses": ["a", "b"], "scores": [0, 1]})
    (pair,), _ = read_scored(open_source(str(path)), render=Renderer(lambda: chat))  # type: ignore[arg-type]
    assert (pair.prompt, pair.chosen, pair.rejected) == ("2 turns", "b after hi", "a after hi")
    assert pair.scores == (1, 0)


def test_equal_and_empty_responses_are_dropped_where_rows_are_filtered(tmp_path):
    path = write(tmp_path / "rows.jsonl", row(["a", "a"], [1, 0]), row(["a", " "], [1, 0]), row(["a", "b"], [1, 0]))
    rows, report = read_scored(open_source(str(path)), render=RENDER)
    assert len(rows) == 1 and report.dropped == {"chosen equals rejected": 1, "empty response": 1}
    rows, report = read_scored(open_source(str(path)), strict=False, render=RENDER)
    assert [pair.scores for pair in rows] == [(1, 0)] * 3 and not report.dropped


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [NaN, 1]}', "score 1 is not finite"),
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [0, -Infinity]}', "score 2 is not finite"),
        (row(["a", "b"], [0, 1e300]), "score 2 is too large"),
        (row(["a", "b"], [0, 10**60]), "score 2 is too large"),
        (row(["a", "b"], [0, "1.5"]), "score 2 must be a number, not '1.5'"),
        (row(["a", "b"], [0, None]), "score 2 must be a number, not None"),
        (row(["a", "b"], [0, True]), "score 2 must be a number, not True"),
        (row(["a", "b"], [0, 1, 2]), "2 responses have 3 scores"),
        (row(["a"], [0]), "two responses or more, not 1"),
        (row([], []), "two responses or more, not 0"),
        (row("ab", [0, 1]), "'responses' must be a list, not str"),
        (row(["a", "b"], 3), "'scores' must be a list, not int"),
        (row(["a", 7], [0, 1]), "'response 2 of responses' must be a string, not int"),
        ({"prompt": "p", "responses": ["a", "b"]}, "no field 'scores'; it has: prompt, responses"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "no field 'responses'; it has: prompt, chosen, rejected"),
        ({"responses": ["a", "b"], "scores": [0, 1]}, "no field 'prompt'"),
    ],
)
def test_a_broken_row_is_an_error_with_its_line(bad, words, tmp_path):
    path = write(tmp_path / "rows.jsonl", row(["a", "b"], [0, 1]), bad)
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{words}"):
        read_scored(open_source(str(path)), render=RENDER)


def test_other_sources_may_hold_plain_rows(tmp_path):
    readers = _format("scored").readers(DataConfig(), {"strict": True, "max_rows": None, "render": RENDER})
    scored = open_source(str(write(tmp_path / "scored.jsonl", row(["a", "b"], [0, 1]))))
    pairs = open_source(str(write(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"})))
    shown = open_source(str(write(tmp_path / "sft.jsonl", {"prompt": "p", "response": "d"})))
    assert [r.scores for r in readers.preferences(scored)[0]] == [(1, 0)]
    assert [(r.chosen, r.scores) for r in readers.preferences(pairs)[0]] == [("c", None)]
    assert [r.response for r in readers.demonstrations(scored)[0]] == ["b"]
    assert [r.response for r in readers.demonstrations(shown)[0]] == ["d"]
    assert [r.prompt for r in readers.prompts(scored)[0]] == ["p"]


def test_pairs_without_scores_are_refused_before_anything_is_made(tmp_path):
    path = write(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"})
    with pytest.raises(UserError, match=r"data\.path: .*pairs\.jsonl:1: the row brings no scores"):
        check_scores(DataConfig(kind="scored", path=(str(path),)))
    ranked = write(tmp_path / "ranked.jsonl", {"prompt": "p", "answers": ["a", "b"], "scores": [0, 1]})
    check_scores(DataConfig(kind="scored", path=(str(ranked),), columns={"responses": "answers"}))


def test_scored_selection_needs_scored_rows():
    with pytest.raises(UserError, match=r"select\.pair_source=scored needs rows .*data\.kind=scored, not pairs"):
        load_config(None, ("select.pair_source=scored", "data.path=a.jsonl"))


def test_a_misspelt_field_of_data_columns_is_refused():
    with pytest.raises(UserError, match=r"data\.columns\.score: rows have no such field.*scores"):
        check_columns([], (("score", "rm2"),), _format("scored").fields, 1)
    assert all(_format(kind).fields for kind in ROW_FORMATS)
