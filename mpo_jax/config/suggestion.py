"""The known name that a misspelt one is closest to."""

import difflib


def suggest(part: str, known: list[str]) -> str:
    close = difflib.get_close_matches(part, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(known)}" if known else "; this key holds a value, not a section"
