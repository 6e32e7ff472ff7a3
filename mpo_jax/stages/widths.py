"""A few widths for arrays whose length is known only when they are made."""

MULTIPLE, MAX_WIDTHS = 64, 4
"""Columns of which a width is a multiple, and the number of widths at most. Programs are compiled for every width that
comes up; columns fewer than 64 apart save less than that costs."""


def few_widths(columns: int) -> tuple[int, ...]:
    """Ascending widths for up to `columns` columns, which is the last of them."""
    step = -(-columns // (MULTIPLE * MAX_WIDTHS)) * MULTIPLE
    return (*range(step, columns, step), columns)
