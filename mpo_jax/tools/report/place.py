"""The place of a workdir's report, which is replaced whole: nobody else's files may be in it."""

from pathlib import Path

from mpo_jax.errors import UserError

FOLDER, PAGE, INPUTS = "report", "index.html", "inputs.json"
OURS = frozenset({PAGE, INPUTS, "tables", "figures"})
WRITTEN_BY = "mpo_jax"
"""What every page of ours says at its end."""


def check_place(workdir: Path) -> None:
    """Raises UserError if `<workdir>/report` holds what no report has, so that it would be lost."""
    folder = workdir / FOLDER
    advice = "the report would replace it: move it away, or use another workdir"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is no folder of a report; {advice}")
    if foreign := sorted(path.name for path in folder.glob("*") if path.name not in OURS):
        raise UserError(f"{folder} holds {foreign[0]!r}, which is no part of a report; {advice}")
    page = folder / PAGE
    if page.is_file() and page.stat().st_size and WRITTEN_BY not in page.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{page} is no report of mpo_jax; {advice}")
