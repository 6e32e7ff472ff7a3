"""Answers outlive the process, a half-written line, and one another."""

import io
import json
import stat
import subprocess
import sys

import pytest
from rich.console import Console

from mpo_jax.errors import UserError
from mpo_jax.tools.judge.cache import Cache, content_key


@pytest.fixture
def said():
    return Console(file=io.StringIO(), width=200)


def test_what_was_put_is_there_for_the_next_one_at_once(tmp_path, said):
    path = tmp_path / "new" / "answers.jsonl"
    cache = Cache(path, said)
    assert cache.get("k") is None
    cache.put("k", {"text": "line\nbreak \u2028 ü \ud800"})
    other = Cache(path, said)
    assert other.get("k")["text"].startswith("line\nbreak \u2028 ü ") and cache.get("k")["key"] == "k"
    other.put("l", {"text": "2"})
    cache.put("m", {"text": "3"})
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["k", "l", "m"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and said.file.getvalue() == ""


def test_broken_lines_are_left_out_with_a_warning(tmp_path, said):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(
        b'{"key": "a", "text": "1"}\n\n[3]\n\xff\n{"text": "no key"}\n'
        b'{"key": "c"}\n{"key": "d", "text": 5}\n{"key": "b", "te'
    )
    cache = Cache(path, said)
    assert cache.get("a") and cache.get("b") is None
    warned = [line for line in said.file.getvalue().splitlines() if "broken line" in line]
    assert [line.split(":")[1] for line in warned] == ["3", "4", "5", "6", "7", "8"]
    cache.put("b", {"text": "2"})  # on a line of its own
    assert Cache(path, said).get("b")["text"] == "2"


def test_a_folder_that_cannot_be_used(tmp_path, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use the cache .* name another folder: --cache"):
        Cache(tmp_path / "file" / "answers.jsonl", said)


def test_an_answer_outlives_a_killed_process(tmp_path, said):
    script = (
        "import os, pathlib, sys; from rich.console import Console; from mpo_jax.tools.judge.cache import Cache\n"
        "Cache(pathlib.Path(sys.argv[1]), Console()).put('k', {'text': 'x'}); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, tmp_path / "answers.jsonl"]
    assert subprocess.run(command, check=False).returncode == -9
    assert Cache(tmp_path / "answers.jsonl", said).get("k") == {"key": "k", "text": "x"}


def test_keys_of_texts_that_join_to_the_same():
    keys = {content_key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""), ("a|1|b", "c"))}
    assert len(keys) == 5 and content_key("a", "b") == content_key("a", "b")
