"""The prompt holds each text once, at its place, whatever the texts say."""

import pytest

from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import Pair
from mpo_jax.tools.judge.prompt import PROMPT, fill, read_prompt
from tests.tools.judge.server import words

DIMENSIONS = ("concise", "honest and accurate", "ethical", "natural and fluent", "specific", "educational and engaging",
              "methodical", "multilingual", "creative", "comprehensive")  # fmt: skip


def test_the_ten_dimensions_in_order_and_the_answer_s_lines():
    lines = PROMPT.lower().splitlines()
    assert [line.split(". ")[1].split(":")[0] for line in lines if line[:1].isdigit()] == list(DIMENSIONS)
    assert PROMPT.splitlines()[-4:] == [
        "Response 1 Quality Score: x", "Explanation: ...", "Response 2 Quality Score: x", "Explanation: ...",
    ]  # fmt: skip


def test_places_are_filled_once():
    pair = Pair("Say {response_1} and {instruction}", " {response_2} {x}", "{response_1} b c")
    plain, swapped = (fill(PROMPT, pair, swapped=swapped) for swapped in (False, True))
    for text in (plain, swapped):
        assert "\nSay {response_1} and {instruction}\n" in text
    assert "[Start of response 1]\n{response_2} {x}\n[End" in plain and words(plain) == (2, 3)
    assert "[Start of response 1]\n{response_1} b c\n[End" in swapped and words(swapped) == (3, 2)


def test_a_prompt_of_a_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeff{response_2}|{instruction}|{response_1}|{other}".encode())
    assert fill(read_prompt(path), Pair("i", "a", "b"), swapped=False) == "b|i|a|{other}"
    path.write_text("{instruction} {response_1}")
    with pytest.raises(UserError, match=r"prompt.txt lacks \{response_2\}"):
        read_prompt(path)
    path.write_bytes(b"\xff\xfe")
    for wrong in (path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompt(wrong)
