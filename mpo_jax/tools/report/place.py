"""The place of a workdir's report, which is replaced whole: nobody else's files may be in it."""

import re
from pathlib import Path

from mpo_jax.errors import UserError

FOLDER, PAGE, INPUTS = "report", "index.html", "inputs.json"
PARTS = {"tables": (".csv",), "figures": (".png", ".csv")}
"""The folders in it, and how the names of their files end."""
LISTED = re.compile(r'<meta name="files" content="([^"]*)">')
"""Where a page names the files that were written with it; those of older versions name none."""
WRITTEN_BY = "Written by mpo_jax"
"""What every page of ours says at its end."""


def check_place(workdir: Path) -> None:
    """Raises UserError if `<workdir>/report` holds what no report has, so that it would be lost."""
    folder = workdir / FOLDER
    page = folder / PAGE
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() and not folder.is_symlink() else ""
    # a page that was damaged still has its tables or its record beside it
    whole = WRITTEN_BY in text
    listed = set(names[1].split("|")) if whole and (names := LISTED.search(text)) else None
    advice = "the report would replace it: move it away, or use another workdir"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is no folder of a report; {advice}")
    found = list(folder.rglob("*"))
    for path in sorted(found):
        parts = path.relative_to(folder).parts
        if not _is_ours(path, parts) or (listed is not None and len(parts) == 2 and "/".join(parts) not in listed):
            raise UserError(f"{path} is no part of a report; {advice}")
    if found and not whole and folder / INPUTS not in found and not (folder / "tables" / "main.csv").is_file():
        raise UserError(f"{page} is no page of mpo_jax; {advice}")


def _is_ours(path: Path, parts: tuple[str, ...]) -> bool:
    if path.is_symlink():
        # what it leads to is not lost
        return len(parts) == 1 and parts[0] in (PAGE, INPUTS)
    if len(parts) == 1:
        return parts[0] in PARTS if path.is_dir() else parts[0] in (PAGE, INPUTS)
    return len(parts) == 2 and path.is_file() and path.suffix in PARTS[parts[0]]
