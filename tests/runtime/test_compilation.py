"""What is said of compilations: names and places of slow ones, and counts of what JAX reports."""

import jax
import jax.numpy as jnp

from mpo_jax.runtime import compilation
from mpo_jax.runtime.compilation import Compilations, watched


def test_slow_ones_are_named_in_their_order(monkeypatch, capsys):
    monkeypatch.setattr(compilation, "SLOW_S", -1.0)
    seen = Compilations()
    seen.expect({"update": ["ppo critic", "ppo actor"]}, 4)
    said = []
    for _ in range(3):
        seen.lowered("update")
        seen.show_slow()
        seen.show_slow()
        seen.compiled("update", 7.0)
        said.append(capsys.readouterr().out.splitlines())
    # a second width comes after both programs of the first
    assert said == [
        ["  compiling ppo critic (1 of 4) ...", "  compiled ppo critic in 7 s"],
        ["  compiling ppo actor (2 of 4) ...", "  compiled ppo actor in 7 s"],
        ["  compiling ppo critic (3 of 4) ...", "  compiled ppo critic in 7 s"],
    ]
    assert seen.summary == "3 programs of the stage compiled; all compilations took 21 s"


def test_quick_ones_are_not_named_and_cached_ones_are_counted(capsys):
    seen = Compilations()
    seen.expect({"step": ["sft step"]}, 2)
    for cached in (True, False):
        seen.lowered("step")
        seen.show_slow()
        if cached:
            seen.found()
        seen.compiled("step", 0.5)
    assert capsys.readouterr().out == ""
    assert (seen.number, seen.cached) == (2, 1)
    assert "1 of them found in the cache" in seen.summary


def test_a_lambda_is_not_named(monkeypatch, capsys):
    monkeypatch.setattr(compilation, "SLOW_S", -1.0)
    seen = Compilations()
    for function in ("<lambda>", "init_parameters"):
        seen.lowered(function)
        seen.show_slow()
        seen.compiled(function, 7.0)
    said = capsys.readouterr().out
    assert "<lambda>" not in said and "compiled a small program without a name in 7 s" in said
    assert "compiling init_parameters ..." in said


def test_what_jax_reports_is_counted():
    def a_function_of_this_test(x):
        return x + 1

    function, x = jax.jit(a_function_of_this_test), jnp.zeros(3)
    with watched() as seen:
        seen.expect({"a_function_of_this_test": ["it"]}, 1)
        for _ in range(2):
            function(x)
        assert (seen.number, seen.cached) == (1, 0) and seen.seconds > 0
    function(jnp.zeros(4))
    assert seen.number == 1, "it watches no longer"
