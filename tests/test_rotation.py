"""tests.rotation: N parts have every long test once, and all other tests each."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.covering import the_rest_thorough
from tests.rotation import in_part, part

TESTS = [("a.py", True), ("a.py", False), ("b.py", True), ("b.py", True), ("c.py", False), ("d.py", True)]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_every_long_test_is_in_one_part_and_the_others_in_all(parts):
    kept = [in_part(number, parts, TESTS) for number in range(1, parts + 1)]
    times = [sum(k) for k in zip(*kept, strict=True)]
    assert times == [1 if long else parts for _, long in TESTS]


def test_a_modules_long_tests_stay_together():
    assert in_part(2, 3, TESTS) == [False, True, True, True, True, False]


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0", ""])
def test_no_part(text):
    with pytest.raises(ValueError, match="no part such as 1/4"):
        part(text)


@pytest.mark.parametrize("workers", the_rest_thorough([((),), (("-n", "2"),)]))
def test_pytest_takes_the_part(tmp_path, workers):
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(
            "import pytest\n\n@pytest.mark.thorough\ndef test_long(): pass\n\ndef test_short(): pass\n"
        )
    (tmp_path / "conftest.py").write_text("from tests.rotation import *\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = thorough\n")
    command = [sys.executable, "-m", "pytest", "-v", *workers, "--part", "2/2", "."]
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout
    assert "test_a.py::test_long" not in run.stdout
