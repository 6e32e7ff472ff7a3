"""Totals are read as judges write them, or not at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.tools.judge.parse import parse_totals
from tests.tools.judge.server import scores

NUMBER = st.decimals(0, 10, places=2, allow_nan=False).map(lambda d: f"{d.normalize():f}")


@given(NUMBER, NUMBER, st.sampled_from(["{}", "{}/10", "{} / 10", "{} out of 10", "[{}]", "**{}**", "{}.", "{},"]))
def test_every_form_of_every_number(first, second, form):
    assert parse_totals(scores(form.format(first), form.format(second))) == (float(first), float(second))


@pytest.mark.parametrize(
    ("text", "totals"),
    [
        (scores("8", "8.5/10"), (8.0, 8.5)),
        ("**Response 1 Quality Score:** 7\n\n**Response 2 Quality Score:** 6.5/10", (7.0, 6.5)),
        ("response 2 quality score: 3 Explanation: x\nRESPONSE 1 QUALITY SCORE : 4", (4.0, 3.0)),
        ("### Response [1] Quality Score: `9`\n### Response [2] Quality Score: `0`", (9.0, 0.0)),
        (f"<think>{scores(1, 2)}</think>{scores(3, 4)}", (3.0, 4.0)),
        (f"{scores(1, 2)} no, wait</think>{scores(3, 4)}", (3.0, 4.0)),
        (f"{scores(3, 4)}\n\nIn short:\n{scores('3.0', '4/10')}", (3.0, 4.0)),
        ("Response 1 Quality Score: 8 - good\nResponse 2 Quality Score: 7 (fine)", (8.0, 7.0)),
    ],
)
def test_what_judges_write(text, totals):
    assert parse_totals(text) == totals


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot judge this.",
        "Response 1 Quality Score: 8",
        "Response 1 Quality Score: x\nResponse 2 Quality Score: x",
        scores(8, "eight"),
        scores(8, 11),
        scores(85, 70),
        scores(8, -1),
        scores("8-9", 7),
        scores("8 to 9", 7),
        scores("10\u20139", 7),
        scores("8,5", 7),
        scores("8.5.1", 7),
        scores("4/5", "3/5"),
        scores("8/100", "3/100"),
        scores("8/10/10", 7),
        f"{scores(3, 4)}\n{scores(5, 4)}",
        f"<think>{scores(3, 4)}",
        "Response 3 Quality Score: 8\nResponse 2 Quality Score: 7",
    ],
)
def test_nothing_is_guessed(text):
    assert parse_totals(text) is None
