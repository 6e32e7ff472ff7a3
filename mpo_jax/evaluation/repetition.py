"""How much a text repeats itself."""

WORDS = 3
"""Length of the sequences that are compared."""


def repeated(text: str) -> float:
    """The share of a text's three-word sequences that stand in it before; 0 for a text of fewer words than four.

    Words are what spaces part: the share says little of texts in languages without them.
    """
    words = text.split()
    sequences = list(zip(*(words[start:] for start in range(WORDS)), strict=False))
    return 1.0 - len(set(sequences)) / len(sequences) if sequences else 0.0
