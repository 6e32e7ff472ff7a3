"""Parsing of a judge's answer: the two totals, or None. Nothing is guessed."""

import re

LARGEST = 10.0

_MARKS = r"[\s*_`\[\]()]*"
_LINE = re.compile(
    # ... the words, whatever emphasis or brackets a judge puts around them ...
    rf"Response{_MARKS}([12]){_MARKS}Quality{_MARKS}Score[\s*_`]*:{_MARKS}"
    # ... a number, perhaps out of ten ...
    r"(\d+(?:\.\d+)?)(?:\s*(?:/|out\s+of)\s*(\d+(?:\.\d+)?))?"
    # ... and no more of one: a range, another fraction, a decimal comma
    r"(?!\s*(?:[-\u2013/]|to\b)\s*\d|[.,]?\d)",
    re.IGNORECASE,
)
# some servers omit the opening mark, and a truncated answer has no closing one
_THOUGHT = re.compile(r"\A.*</think>|<think>.*\Z", re.DOTALL | re.IGNORECASE)


def parse_totals(text: str) -> tuple[float, float] | None:
    """The quality scores of response 1 and response 2, each from 0 to 10: "8", "8.5", "8/10".

    None if one is missing, out of range, out of another total than ten, or given twice with different values. Text
    before </think>, or after a <think> that is never closed, is ignored.
    """
    found: dict[str, set[float]] = {"1": set(), "2": set()}
    for side, number, whole in _LINE.findall(_THOUGHT.sub("", text)):
        if whole and float(whole) != LARGEST:
            return None
        found[side].add(float(number))
    first, second = found["1"], found["2"]
    if len(first) != 1 or len(second) != 1 or max(first | second) > LARGEST:
        return None
    return first.pop(), second.pop()
