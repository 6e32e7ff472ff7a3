"""Rows, sheets, keys, caches and a workdir's files: deep, long or pipes; and names that hold markup, in messages."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mpo_jax.cli.judge import _object
from mpo_jax.config.schema import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.sources import open_source
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import Damaged, UserError
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime import parts
from mpo_jax.runtime.console import Console
from mpo_jax.runtime.files import naming_damage, read_json, read_lines
from mpo_jax.runtime.parts import MANIFEST, Parts
from mpo_jax.tools.human.importing import read_sheet
from mpo_jax.tools.human.sheets import read_key
from mpo_jax.tools.judge.cache import Cache
from mpo_jax.tools.report.verdict_rows import find_verdicts
from mpo_jax.training.tracker import _truncate_after
from mpo_jax.untrusted import MAX_DEPTH
from tests.tools.human.studies import study

RATHER = "[" * 300 + "]" * 300
DEEP = "[" * 50_000 + "]" * 50_000
LONG, LONGER = "9" * 200, "9" * 5_000
VALUES = {"rather deep": RATHER, "deep": DEEP, "long": LONG, "longer": LONGER}
ANNOTATOR = '{{"study": "x", "annotator": "y", "choices": {{"1": {}}}}}'


def rows(path: Path) -> list:
    return list(open_source(str(path)).rows())


READERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a row": ("a.jsonl", rows, '{{"a": {}}}'),
    "a row of a list": ("a.json", rows, '[{{}},\n{{"a": {}}}]'),
    "a sheet": ("a.json", lambda path: read_sheet(path, study()), ANNOTATOR),
    "a key": ("key.json", read_key, '{{"a": {}}}'),
    "a verdict": ("judge/result.json", lambda path: find_verdicts(path.parent.parent), '{{"a": {}}}'),
    "a workdir's object": ("a.json", lambda path: read_json(path, "delete it"), '{{"a": {}}}'),
    "a workdir's lines": ("a.jsonl", lambda path: read_lines(path, "delete it"), '{{"a": {}}}\n'),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name, read, form", READERS.values(), ids=READERS)
def test_deep_brackets_and_long_numbers_are_broken(tmp_path, name, read, form, value):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(form.format(VALUES[value]))
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name, read, form", READERS.values(), ids=READERS)
def test_a_pipe_in_a_file_s_place_is_an_error_at_once(tmp_path, name, read, form):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match="pipe") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_conversation_of_many_messages_is_not_deep(tmp_path):
    content = [{"role": "user", "content": [{"type": "text", "text": "[{" * 500}]}] * 500
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": content, "n": int("9" * 100)}))
    assert rows(tmp_path / "a.jsonl")[0][1]["a"] == content
    (tmp_path / "b.jsonl").write_text('{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}")
    assert len(rows(tmp_path / "b.jsonl")) == 1
    (tmp_path / "b.jsonl").write_text('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}")
    with pytest.raises(UserError, match=r"b\.jsonl:1: broken JSON: nested more than 100 deep"):
        rows(tmp_path / "b.jsonl")


@pytest.mark.parametrize("value", VALUES)
def test_a_request_s_further_fields(value):
    with pytest.raises(UserError, match="--request is no JSON"):
        _object(f'{{"a": {VALUES[value]}}}')


@pytest.mark.timeout(10)
def test_a_cache_of_answers(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    lines = [f'{{"key": "{name}", "text": "", "a": {value}}}' for name, value in VALUES.items()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"key": "whole", "text": ""}\n']))
    cache = Cache(tmp_path / "a.jsonl", console)
    assert cache.get("whole") and not any(map(cache.get, VALUES))
    assert console.file.getvalue().count("a broken line is left out") == len(VALUES)  # type: ignore[attr-defined]
    cache.close()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot use the cache .*pipe: it is no file, but a pipe"):
        Cache(tmp_path / "pipe", console)


def test_a_reader_that_recurses_finds_damage(tmp_path):
    def recurse():
        recurse()

    (tmp_path / "a").write_text("x")
    with (
        pytest.raises(Damaged, match=r"a is damaged \(RecursionError.*: delete it"),
        naming_damage(tmp_path / "a", "delete it"),
    ):
        recurse()


@pytest.mark.parametrize("line", [f'{{"step": 2, "a": {RATHER}}}', '{"step": 2, "a": ' + LONGER + "}", "[1]", "7"])
def test_metrics_go_on_before_a_broken_line(tmp_path, line):
    (tmp_path / "m.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    assert _truncate_after(tmp_path / "m.jsonl", 5) == {"loss": 2.0}
    assert (tmp_path / "m.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_folder_s_markup_is_its_name(tmp_path, monkeypatch, value):
    """In messages that begin with a style of their own."""
    folder = tmp_path / "[red]x[bold]"
    folder.mkdir()
    (folder / MANIFEST).write_text(f'{{"identity": {{}}, "parts": {value}}}')
    said = Console(file=io.StringIO(), width=500)
    monkeypatch.setattr(parts, "console", said)
    Parts(folder, {"pass": "a"}, minutes=0)
    assert f"{folder / MANIFEST} is damaged" in said.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.timeout(60)
def test_a_tokenizer_that_panics_is_named(tmp_path):
    """Its pattern is not one of those that are refused by their form, and gives up after many tries."""
    toy.make_tokenizer().save_pretrained(tmp_path)
    split = {"type": "Split", "pattern": {"Regex": "^(a|a)*$"}, "behavior": "Isolated", "invert": False}
    state = json.loads((tmp_path / "tokenizer.json").read_text()) | {"pre_tokenizer": split}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    codec = TextCodec(load_tokenizer(tmp_path), TextConfig())
    assert codec.prompt("hi").ids
    with pytest.raises(UserError, match=f"the tokenizer in {tmp_path} fails on a text: "):
        codec.prompt("a" * 60 + "!")
