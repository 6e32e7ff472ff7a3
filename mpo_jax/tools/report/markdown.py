"""Rows as Markdown tables, aligned so that they also read well on a terminal."""

from collections.abc import Sequence
from typing import Any

SHARES = (
    "accuracy",
    "share",
    "win",
    "tie",
    "lose",
    "confidence",
    "expected_calibration_error",
    "has_eos",
    "repetition",
)
"""Columns that are shown in percent, with all whose names end in `_accuracy`."""


def cell(key: str, value: Any) -> str:
    """A value for readers: shares in percent, other fractions with three decimals, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if key.removeprefix("votes_").removesuffix("_low").removesuffix("_high") in SHARES or key.endswith("_accuracy"):
        return f"{value:.1%}"
    if key in ("threshold", "low", "high") and value == round(value, 2):
        return f"{value:g}"
    if key in ("length", "tokens"):
        return f"{value:.1f}"
    return f"{value:.4f}" if key in ("p", "p_holm") else f"{value:.3f}"


NAMES = {
    "score": "reward",
    "length": "tokens",
    "repetition": "repeated",
    "p_holm": "p, Holm",
    "ci_low": "95% from",
    "ci_high": "to",
    "paper_hh": "paper, HH-RLHF",
    "paper_tldr": "paper, TL;DR",
    "paper_hh_accuracy": "paper, HH-RLHF",
    "paper_tldr_accuracy": "paper, TL;DR",
    "se_seeds_accuracy": "s.e. (seeds)",
}
ENDINGS = {
    "_se_seeds": "s.e. (seeds)", "_se_prompts": "s.e. (prompts)", "_se": "s.e.", "_low": "from", "_high": "to",
}  # fmt: skip


def heading(key: str) -> str:
    """A column's name as people read it: `reward_se_seeds` is `reward s.e. (seeds)`."""
    if key in NAMES:
        return NAMES[key]
    for ending, name in ENDINGS.items():
        if key.endswith(ending):
            return f"{heading(key.removesuffix(ending))} {name}"
    return key.replace("_", " ")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with the columns of all rows; numbers to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    # a column that is empty in every row is left out
    keys = [key for key in keys if any(row.get(key) is not None for row in rows)]
    text = [[cell(key, row.get(key)).replace("|", "\\|").replace("\n", " ") for key in keys] for row in rows]
    names = [heading(key) for key in keys]
    widths = [max(3, *(len(line[i]) for line in [names, *text])) for i in range(len(keys))]
    right = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in keys]

    def line(cells: list[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(names), line(rule), *map(line, text)])


def section(title: str, note: str, rows: Sequence[dict[str, Any]]) -> str:
    """A heading, its table, and what must be known to read it."""
    return f"## {title}\n\n{markdown(rows)}\n\n{note}\n"
