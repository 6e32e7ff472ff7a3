"""Packages that only some inputs need: everything else works without them, and their absence is one message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MICRO = Path(__file__).parent / "configs" / "micro.yaml"
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({names!r})); from mpo_jax.cli.app import main; main()"


def mpo_without(names: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process where these packages cannot be imported."""
    command = [sys.executable, "-c", WITHOUT.format(names=names), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.thorough
def test_local_rows_and_folders_need_neither(shared_data, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": str(n), "chosen": "a", "rejected": "b"}) + "\n" for n in range(99)))
    keys = (f"model.path={shared_data / 'models' / 'stories260K'}", "data.kind=pairs", f"data.path={rows}")
    done = mpo_without(["datasets", "gguf"], "data", str(MICRO), *keys, "runtime.token_cache=null")
    assert done.returncode == 0 and "demonstrations, row 1" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("package", "keys"),
    [
        ("gguf", ("model.path={folder}/model.gguf", "data.kind=pairs", "data.path={folder}/rows.jsonl")),
        ("datasets", ("data.kind=pairs", "data.path=hub:org/name")),
        ("datasets", ("data.kind=pairs", "data.path={folder}/saved")),
    ],
)
def test_absence_is_one_message(package, keys, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    rows = "".join(json.dumps({"prompt": str(n), "chosen": "b", "rejected": "c"}) + "\n" for n in range(99))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    done = mpo_without([package], "data", str(MICRO), *(key.format(folder=tmp_path) for key in keys))
    assert done.returncode == 2 and f"pip install {package}" in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.thorough
def test_a_judge_s_calls_are_planned_without_its_client(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "response": "b"}\n')
    sides, folder = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")), f"--cache={tmp_path}"
    judge = ("judge", *sides, "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", folder)
    done = mpo_without(["openai", "tenacity", "statsmodels"], *judge)
    assert "2 to make" in done.stdout
    assert done.returncode == 2 and "pip install openai tenacity" in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
