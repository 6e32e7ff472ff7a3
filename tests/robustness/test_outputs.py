"""What a command is to write to is tried before it works: a folder where a file should be, and the other way round."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpo_jax.cli import exits
from mpo_jax.errors import UserError
from mpo_jax.runtime.files import check_output, write_json, write_lines
from tests.pipeline.test_pipeline import MICRO, mpo

LATE_AND_OTHER = ("Event loop is closed", "another fault")


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    return {"folder": str(tmp_path / "folder"), "file": str(tmp_path / "file"), "rows": str(rows)}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "judge {rows} {rows} --model m --endpoint http://x:1/v1 --out {file}",
            "--out {file}: {file} is a file",
        ),
        ("human export {rows} {rows} --out {file}", "--out {file}: {file} is a file"),
        ("human import {rows} --key {rows} --out {file}/under", "--out {file}/under: {file} is a file"),
        ("bench sft --json {folder}", "--json {folder} is a folder"),
        ("bench sft --profile {file}", "--profile {file}: {file} is a file"),
        (f"plan {MICRO} --on cpu --json {{folder}}", "--json {folder} is a folder"),
    ],
)
def test_an_output_is_tried_first(places, capsys, monkeypatch, command, says):
    for module in ("mpo_jax.tools.sides.compared", "mpo_jax.tools.bench.speed.measure_all"):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("work began"))
    assert mpo(*command.format(**places).split()) == 2
    assert says.format(**places) in capsys.readouterr().err
    assert sorted(os.listdir(places["folder"])) == []


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    check_output(tmp_path / "old.json", "--json")
    check_output(tmp_path / "new" / "out.json", "--json")
    assert (tmp_path / "old.json").read_text() == "{}" and not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"--json .*: .*old\.json is a file; name another place"):
        check_output(tmp_path / "old.json" / "deeper" / "x.json", "--json")


def test_a_lone_surrogate_in_an_answer_is_kept(tmp_path):
    """JSON can carry it, and a judge may write it: what was paid for would be lost at the end."""
    row = {"text": "half \ud83d a pair, and \U0001f600"}
    write_lines(tmp_path / "rows.jsonl", [row])
    write_json(tmp_path / "one.json", row)
    assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8")) == row
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8")) == row


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda folder: (folder / "gone" / "x").write_text(""), r"gone/x is missing.*was deleted or moved while"),
        (lambda folder: (folder / "file" / "x").mkdir(), r"file/x: something else is in this place"),
        (lambda folder: (folder / "file").mkdir(), r"file: something else is in this place.*delete it or move it away"),
    ],
    ids=["a folder deleted under way", "a file above", "a file in place"],
)
def test_errors_of_the_file_system_name_the_place(tmp_path: Path, capsys, act, says):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as end, exits.reported(debug=False):
        act(tmp_path)
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.search(says, said) and said.count("\n") == 1


def test_what_writing_threads_print_of_an_error_is_left_out(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    exits.hide_leftovers()
    late, other = (SimpleNamespace(exc_type=RuntimeError, exc_value=RuntimeError(text)) for text in LATE_AND_OTHER)
    sys.unraisablehook(late)  # type: ignore[arg-type]
    sys.unraisablehook(other)  # type: ignore[arg-type]
    assert shown == [other]
