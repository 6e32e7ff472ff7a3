"""mpo_jax.evaluation.reward_function: what a user's function gets, and what is said of what it must not return."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from mpo_jax.data.text_rows import TextRow
from mpo_jax.errors import UserError
from mpo_jax.evaluation.reward_function import RewardFunction, fingerprint_function

TURNS = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "two and two?"})
ROWS = [TextRow("one", " a", True), TextRow("two", " b b", False), TextRow(TURNS, "four", True)]


@pytest.fixture
def define(tmp_path, monkeypatch):
    """A function from source to a `RewardFunction` in a module of its own, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(body: str, name: str = "f") -> RewardFunction:
        module = f"rewards_{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{module}.py").write_text(f"import math\n\ndef f(prompts, responses):\n    {body}\n")
        return RewardFunction(f"{module}:{name}")

    return make


def test_it_gets_texts_and_turns_and_its_numbers_come_back(define):
    function = define("seen.append((prompts, responses)); return [len(r) for r in responses]")
    module = sys.modules[function.name.partition(":")[0]]
    module.seen = []
    scores = function(ROWS)
    assert scores.dtype == np.float32 and scores.tolist() == [2.0, 4.0, 4.0]
    assert module.seen == [(["one", "two", [dict(turn) for turn in TURNS]], [" a", " b b", "four"])]


@pytest.mark.parametrize("returned", ["np.float64(0.1)", "jnp.float32(0.1)", "True", "Fraction(1, 10)"])
def test_numbers_of_any_kind_are_taken(define, returned):
    modules = "import numpy as np, jax.numpy as jnp; from fractions import Fraction"
    value = {"True": 1.0}.get(returned, 0.1)
    np.testing.assert_array_equal(define(f"{modules}; return [{returned}] * 3")(ROWS), np.full(3, value, np.float32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"returned 1 numbers for 3 responses, the first at the prompt 'one' with the response ' a'"),
        ("return [1.0, math.nan, 2.0]", r"returned nan at the prompt 'two' with the response ' b b'"),
        ("return [1.0, 2.0, 1e39]", r"returned 1e\+39 at the prompt 'two and two\?' with the response 'four'"),
        ("return None", r"must return a list of numbers, .* it returned NoneType"),
        ("return ['a', 'b', 'c']", r"must return a list of numbers"),
        ("return ['1', '2', '3']", r"must return a list of numbers, .*'1' is no number"),
        ("return {0: 1.0, 1: 2.0, 2: 3.0}", r"must return a list of numbers, .* it returned dict"),
        ("return {1.0, 2.0, 3.0}", r"must return a list of numbers, .* it returned set"),
        ("return '123'", r"must return a list of numbers, .* it returned str"),
        ("return b'123'", r"must return a list of numbers, .* it returned bytes"),
        ("return [1j, 2j, 3j]", r"must return a list of numbers"),
        ("return [10**400, 0, 0]", r"returned inf at the prompt 'one'"),
        ("return ({'one': 1.0}[p] for p in prompts)", r"fails at the prompt 'two' .*\.py:\d+: KeyError: 'two'"),
        ("import sys; sys.exit()", r"fails at the prompt 'one' .*\.py:\d+: SystemExit"),
        (
            "return [1 / (p != 'two') for p in prompts]",
            r"fails at the prompt 'two' .*: .*rewards.*\.py:\d+: ZeroDivisionError",
        ),
        (
            "return [1.0, 2.0, 3.0][len(prompts) - 7]",
            r"fails at the prompt 'one' .*IndexError: list index out of range",
        ),
    ],
)
def test_what_it_must_not_return_is_said_with_the_first_row(define, body, message):
    with pytest.raises(UserError, match=rf"reward\.function=\w+:f {message}"):
        define(body)(ROWS)


def test_a_function_does_not_move_the_run(define, tmp_path):
    (tmp_path / "else").mkdir()
    function = define("import os; os.chdir('else'); return [float(len(os.getcwd()))] * 3")
    assert function(ROWS).tolist() == [float(len(str(tmp_path / "else")))] * 3 and Path.cwd() == tmp_path


def test_a_long_row_is_shown_shortened(define):
    with pytest.raises(UserError) as error:
        define(f"return [{math.inf!r}]".replace("inf", "math.inf"))([TextRow("x" * 500, "y", True)])
    assert "xxx...'" in str(error.value) and len(str(error.value)) < 250


def test_what_is_no_function_is_refused(define, tmp_path):
    function = define("return [0.0] * len(prompts)")
    module = function.name.partition(":")[0]
    with pytest.raises(UserError, match=f"{module}:g: {module} has no g"):
        RewardFunction(f"{module}:g")
    with pytest.raises(UserError, match=r":math is no function but module"):
        RewardFunction(f"{module}:math")
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=r"importing broken_rewards fails: SyntaxError"):
        RewardFunction("broken_rewards:f")
    (tmp_path / "raising").mkdir()
    (tmp_path / "raising" / "__init__.py").write_text("raise OSError('no key')")
    (tmp_path / "raising" / "rewards.py").write_text("f = len\n")
    with pytest.raises(UserError, match=r"importing what holds raising\.rewards fails: OSError: no key"):
        fingerprint_function("raising.rewards:f")
    with pytest.raises(UserError, match=r"no file of a module sys "):
        fingerprint_function("sys:exit")


def test_the_current_folder_comes_first_and_is_named_once(define, tmp_path):
    sys.path = [path for path in sys.path if path not in ("", str(tmp_path))]
    (tmp_path / "here.py").write_text("")
    assert fingerprint_function("here:f") == fingerprint_function("here:f") != fingerprint_function("here:g")
    assert sys.path.count(str(tmp_path)) == 1 and sys.path[0] == str(tmp_path)
