"""Columns that have other names than the fields of a row format: `data.columns`."""

from collections.abc import Iterable, Sequence

from mpo_jax.config.base import Names
from mpo_jax.config.suggestion import suggest
from mpo_jax.data.fields import MissingField
from mpo_jax.data.sources import Changed, Source
from mpo_jax.data.text_files import Row, columns_of
from mpo_jax.errors import UserError


def renamed(source: Source, columns: Names) -> Source:
    """The source with fields taken from columns of other names.

    Args:
      columns: pairs of a field and the column that holds it. A row without the column keeps a field of that name: the
        rows of other paths can have other columns.
    """

    def taken(_: str, row: Row) -> Iterable[Row]:
        yield {**row, **{field: row[column] for field, column in columns if column in row}}

    return Changed(source, taken) if columns else source


def advice(error: MissingField) -> str:
    """The message about a missing field, and what takes it from another column."""
    return f"{error}. data.columns.{error.field}=NAME takes it from another column"


def check_columns(sources: Sequence[Source], columns: Names, fields: Sequence[str], max_rows: int) -> None:
    """Checks that the row format has each field, and some of the sources' first rows each column.

    Args:
      sources: as `renamed` gives them.
      fields: of the row format; empty: not known.

    Raises:
      UserError: for a field that the format lacks, or a column that no source has.
    """
    for field, _ in columns:
        if fields and field not in fields:
            raise UserError(f"data.columns.{field}: rows have no such field{suggest(field, [*fields])}")
    found: Row = {}
    for source in sources if columns else ():
        for _, row in (source.source if isinstance(source, Changed) else source).rows(max_rows):
            found |= row
    for field, column in columns:
        if found and column not in found:
            raise UserError(
                f"data.columns.{field}={column}: the first rows have no column {column!r}; they have: "
                f"{columns_of(found)}"
            )
