"""Numbers in messages, and text of others."""

import re

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, which move the cursor or set a title, and those that turn the direction of text."""


def counted(number: int, one: str, many: str = "") -> str:
    """`1 stage`, `2 stages`.

    Args:
      many: the plural; by default `one` with an s.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def size(num_bytes: float) -> str:
    """`13.5 GB`, `4.2 MB`, `90 kB`, `400 bytes`; a thousand kB are a MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes >= 1e3 else counted(round(num_bytes), "byte")


def printable(text: str) -> str:
    r"""The text with control characters spelled out, such as \x1b; line breaks and tabs stay."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
