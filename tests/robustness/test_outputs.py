"""What a command is to write to is tried before it works: a folder where a file should be, and the other way round."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_origin, get_type_hints

import pytest

from mpo_jax.cli import exits
from mpo_jax.cli.app import app
from mpo_jax.cli.arguments import expanded
from mpo_jax.config.load import load_config
from mpo_jax.errors import UserError
from mpo_jax.runtime.files import write_json, write_lines, write_text
from mpo_jax.runtime.outputs import check_output_file
from mpo_jax.tools.report.place import check_place
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
            "--out {file} is a file: name a folder",
        ),
        ("human export {rows} {rows} --out {file}", "--out {file} is a file: name a folder"),
        ("human import {rows} --key {rows} --out {file}/under", "--out: {file} is not a folder"),
        ("bench sft --json {folder}", "--json {folder} is a folder"),
        ("bench sft --profile {file}", "--profile {file} is a file: name a folder"),
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
    check_output_file("--json", tmp_path / "old.json")
    check_output_file("--json", tmp_path / "new" / "out.json")
    assert (tmp_path / "old.json").read_text() == "{}" and not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"--json: .*old\.json is not a folder: choose another place"):
        check_output_file("--json", tmp_path / "old.json" / "deeper" / "x.json")


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


@pytest.mark.parametrize("command", ["score {model} {data} --out {file}", "accuracy {model} {data} --json {file}"])
def test_nothing_that_is_read_is_written(tmp_path, capsys, command):
    for name in ("rows", "model"):
        (tmp_path / name).mkdir()
    rows, weights = tmp_path / "rows" / "a.jsonl", tmp_path / "model" / "model.safetensors"
    for file in (rows, weights):
        file.write_text("kept")
        words = {"model": tmp_path / "model", "data": tmp_path / "rows", "file": file}
        assert mpo(*(word.format(**words) for word in command.split())) == 2
        assert "which is read: name another" in capsys.readouterr().err and file.read_text() == "kept"
    words = {"model": "m", "data": rows, "file": tmp_path / "out.json"}
    assert mpo(*(word.format(**words) for word in command.split()), f"data.path={rows}") == 2
    assert "the rows are the argument DATA" in capsys.readouterr().err


def test_an_export_spares_its_rows_and_the_workdir(tmp_path, capsys):
    rows = tmp_path / "easy.jsonl"
    rows.write_text("kept")
    select = ("select", "--model", "m", "--data", rows, "--out", tmp_path / "w", "sft.skip=true")
    (tmp_path / "other" / "hard.jsonl").mkdir(parents=True)
    for folder, says in {
        tmp_path: "is the file that is read",
        tmp_path / "w" / "stages" / "x": "lies in the workdir's own folder stages",
        tmp_path / "other": "hard.jsonl is a folder",
    }.items():
        assert mpo(*select, "--export", folder) == 2
        assert says in capsys.readouterr().err and rows.read_text() == "kept"


def test_files_of_an_export_are_not_one(tmp_path, capsys):
    (tmp_path / "hard.jsonl").symlink_to("easy.jsonl")
    assert mpo("select", "no.yaml", "--export", tmp_path) == 2
    assert "hard.jsonl and easy.jsonl lead to one file: remove the links" in capsys.readouterr().err


def test_links_lead_on_and_pipes_stay(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_lines(tmp_path / "link", [{"a": 1}])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == '{"a": 1}\n'
    write_json(Path("/dev/null"), {})
    assert Path("/dev/null").is_char_device()


def test_what_the_shell_has_opened_is_written_as_it_is(tmp_path):
    code = "from pathlib import Path; from mpo_jax.runtime.files import write_json; write_json(Path('/dev/stdout'), 1)"
    with (tmp_path / "log").open("wb") as log:
        log.write(b"before\n")
        log.flush()
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
        os.write(log.fileno(), b"after\n")
    assert (tmp_path / "log").read_text().split() == ["before", "1", "after"]
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"1\n"


def test_a_name_is_as_long_as_a_file_s_may_be(tmp_path):
    write_json(tmp_path / ("\N{LATIN SMALL LETTER E WITH ACUTE}" * 125), {})
    with pytest.raises(UserError, match="more than 255 bytes: choose a shorter one"):
        check_output_file("--out", tmp_path / ("a" * 256))


def test_a_full_disk_names_the_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as error:
        write_lines(tmp_path / "a.jsonl", rows())
    assert error.value.filename == str(tmp_path / "a.jsonl")


def test_no_link_that_waits_in_the_folder_is_followed(tmp_path):
    """Names of temporary files that others can foresee would let them choose what is overwritten."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "kept")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "kept").read_text() == "kept" and not (tmp_path / "a.json").is_symlink()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def rows():
        yield {"a": 1}
        raise OSError("full")

    (tmp_path / "a.jsonl").write_text("old")
    with pytest.raises(OSError, match="full"):
        write_lines(tmp_path / "a.jsonl", rows())
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"] and (tmp_path / "a.jsonl").read_text() == "old"


def test_a_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_report_replaces_no_folder_of_others(tmp_path):
    check_place(tmp_path)
    report = tmp_path / "report"
    for name in ("index.html", "inputs.json"):
        write_text(report / name, ["Written by mpo_jax"])
    check_place(tmp_path)
    (report / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis.tex is no part of a report; .*move it away"):
        check_place(tmp_path)
    (report / "thesis.tex").rename(report / "figures.svg")
    for mine in ("tables/thesis.tex", "figures/mine.svg", "tables/deeper/a.csv"):
        (report / mine).parent.mkdir(parents=True, exist_ok=True)
        (report / "figures.svg").rename(report / mine)
        with pytest.raises(UserError, match="is no part of a report"):
            check_place(tmp_path)
        (report / mine).rename(report / "figures.svg")
    (report / "figures.svg").unlink()
    shutil.rmtree(report / "tables")
    (report / "inputs.json").unlink()
    check_place(tmp_path)
    for text in ("my own page on mpo_jax", ""):
        (report / "index.html").write_text(text)
        with pytest.raises(UserError, match=r"index.html is no page of mpo_jax"):
            check_place(tmp_path)
    assert mpo("report", tmp_path) == 2 and (report / "index.html").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "report").write_text("a file")
    with pytest.raises(UserError, match=r"is no folder of a report"):
        check_place(other)
    assert mpo("run", MICRO, f"workdir={other}") == 2 and not (other / "stages").exists()


def _commands(app):
    for command in app.registered_commands:
        yield command.callback
    for group in app.registered_groups:
        yield from _commands(group.typer_instance)


def test_a_report_s_files_are_those_that_its_page_names(tmp_path):
    (report := tmp_path / "report").mkdir()
    (report / "index.html").write_text('<meta name="files" content="tables/main.csv"> Written by mpo_jax')
    for name in ("main", "mine"):
        write_text(report / "tables" / f"{name}.csv", ["run,prompts"])
    with pytest.raises(UserError, match=r"mine\.csv is no part of a report"):
        check_place(tmp_path)
    (report / "tables" / "mine.csv").unlink()
    check_place(tmp_path)


def test_every_path_of_the_command_line_may_begin_at_home(monkeypatch, tmp_path):
    """Shells leave a ~ in quotes, and behind a =."""
    found = 0
    for command in _commands(app):
        for hint in get_type_hints(command, include_extras=True).values():
            kind, *about = get_args(hint) or (None,)
            if kind is Path or (Path in get_args(kind) and get_origin(kind) is not list):
                found += 1
                assert about[0].parser is expanded, command
    assert found > 10
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a" and expanded("b/~") == Path("b/~")
    with pytest.raises(UserError, match="an empty path was given"):
        expanded("")
    assert load_config(MICRO, ("workdir=~/a",)).workdir == str(tmp_path / "a")
