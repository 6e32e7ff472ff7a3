"""`mpo human export` and `mpo human import`: a double-blind study of which side's answers people prefer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_jax.cli.answers import compared
from mpo_jax.cli.verdicts import table
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import CATEGORY
from mpo_jax.evaluation.verdicts import Outcome, plurality
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_json, write_lines, write_text
from mpo_jax.tools.human import export as sheets
from mpo_jax.tools.human.agreement import summary, unblind
from mpo_jax.tools.human.importing import read_sheets
from mpo_jax.tools.human.sheets import make_study, read_key

RESAMPLES = 2000
ANNOTATORS = 3
"""Fewer give no majority."""


def export(
    a: str,
    b: str,
    *,
    data: str | None,
    n: int | None,
    by: str | None,
    seed: int,
    out: Path,
    overrides: tuple[str, ...],
) -> None:
    """Writes `sheets/study.html` and `sheets/study.csv` for people, and apart from them `key.json`, which tells sides.

    Raises:
      UserError: for what cannot be compared, or if another study's key is there: without it, its sheets are worthless.
    """
    pairs = compared(a, b, data, out=out, overrides=overrides, by=by or CATEGORY)
    study = make_study(pairs, (a, b), n=n, by=by, seed=seed)
    key = out / "key.json"
    if key.exists() and read_key(key) != study:
        raise UserError(f"{key} is the key of another study: choose another folder with --out DIR, or move it away")
    write_json(key, study.to_dict())
    write_text(out / "sheets" / "study.html", [sheets.page(study)])
    # spreadsheets take a file for UTF-8 by its mark
    write_text(out / "sheets" / "study.csv", [sheets.table(study)], encoding="utf-8-sig")
    counts: dict[str, int] = {}
    for item in study.items:
        counts[item.category or "all"] = counts.get(item.category or "all", 0) + 1
    each = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    console.print(f"study {study.id}: {len(study.items)} items ({each})", soft_wrap=True)
    console.print(f"for people:  {out / 'sheets' / 'study.html'} or {out / 'sheets' / 'study.csv'}", soft_wrap=True)
    console.print(f"for you:     {key} tells which side is whose: keep it from them", soft_wrap=True)
    console.print(f"afterwards:  mpo human import FILE FILE FILE --key {key}", soft_wrap=True)


def import_sheets(files: Sequence[Path], *, key: Path, out: Path | None) -> None:
    """Prints the verdict and the agreement, and writes them to `result.json` and a line an item to `votes.jsonl`.

    Args:
      out: the folder; None: the key's.
    """
    study = read_key(key)
    filled = read_sheets(files, study)
    result = {"a": study.a, "b": study.b, "study": study.id, **summary(study, filled, resamples=RESAMPLES, seed=0)}
    result["sheets"] = {sheet.annotator: str(sheet.path) for sheet in filled}
    folder = key.parent if out is None else out
    rows = []
    for item in study.items:
        votes: dict[str, Outcome] = {sheet.annotator: unblind(item, sheet.choices[item.number]) for sheet in filled}
        rows.append({**dataclasses.asdict(item), "votes": votes, "outcome": plurality(list(votes.values()))})
    write_lines(folder / "votes.jsonl", rows)
    write_json(folder / "result.json", result)
    console.print(table(f"{study.a} (A) against {study.b} (B)", "items", result))
    for line in remarks(result):
        console.print(line, soft_wrap=True)
    console.print(f"wrote {folder / 'result.json'} and {folder / 'votes.jsonl'}", soft_wrap=True)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What else there is to know, a line each."""
    people, votes = result["annotators"], result["votes"]
    lines = [
        f"An item counts by the most votes of {people} people, a tie where no outcome has most; 95% Wilson intervals.",
        f"Votes: A {votes['win']}, tie {votes['tie']}, B {votes['lose']}; "
        f"left {result['sides']['left']}, right {result['sides']['right']}.",
    ]
    kappas = {**result.get("kappa_by_category", {}), **({"all": result["kappa"]} if "kappa" in result else {})}
    for name, kappa in kappas.items():
        lines.append(
            f"Fleiss' kappa, {name}: {kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}], {kappa['band']}"
        )
    if kappas:
        lines.append("(95% bootstrap over items; bands of Landis and Koch: slight, fair, moderate, substantial, ...)")
    if people < ANNOTATORS:
        lines.append(f"[yellow]{people} of {ANNOTATORS} people or more: too few for a majority[/yellow]")
    return lines
