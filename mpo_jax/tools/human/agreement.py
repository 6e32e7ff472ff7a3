"""People's choices, unblinded: win, tie and lose of A by the most votes, and agreement."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.evaluation.verdicts import OUTCOMES, Kappa, Outcome, Tally, by_category, fleiss_kappa, plurality
from mpo_jax.runtime.files import write_json, write_lines
from mpo_jax.tools.human.importing import Sheet, read_sheets
from mpo_jax.tools.human.sheets import Choice, Item, Study, read_key

RESAMPLES = 2000


def import_sheets(files: Sequence[Path], *, key: Path, out: Path | None = None) -> tuple[dict[str, Any], Path]:
    """The verdict and the agreement of filled sheets, as `result.json`, and a line an item in `votes.jsonl`.

    Args:
      out: the folder; None: the key's.

    Returns:
      The result and its folder.
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
    return result, folder


def unblind(item: Item, choice: Choice) -> Outcome:
    """A's outcome by the choice of a side."""
    if choice == "tie":
        return "tie"
    return "win" if choice == item.a_is else "lose"


def summary(study: Study, sheets: Sequence[Sheet], *, resamples: int, seed: int) -> dict[str, Any]:
    """Tallies of items, each by the most votes, all votes, and Fleiss' kappa of two or more people; also by category.

    Rates are of items, which are independent; votes for one item are not.
    """
    votes: list[list[Outcome]] = [
        [unblind(item, sheet.choices[item.number]) for sheet in sheets] for item in study.items
    ]
    outcomes: list[Outcome | None] = [plurality(found) for found in votes]
    categories = [item.category for item in study.items]
    result: dict[str, Any] = {
        "items": len(votes),
        "annotators": len(sheets),
        "verdict": Tally.of(outcomes).to_dict(),
        "votes": _counts(votes),
    }
    if tallies := by_category(categories, outcomes):
        result["by_category"] = {name: tally.to_dict() for name, tally in tallies.items()}
        result["votes_by_category"] = {
            name: _counts([found for found, c in zip(votes, categories, strict=True) if c == name]) for name in tallies
        }
    left = sum(choice == "left" for sheet in sheets for choice in sheet.choices.values())
    right = sum(choice == "right" for sheet in sheets for choice in sheet.choices.values())
    result["sides"] = {"left": left, "right": right}
    if len(sheets) > 1:
        counts = np.asarray([[found.count(name) for name in OUTCOMES] for found in votes])
        result["kappa"] = _kappa(fleiss_kappa(counts, resamples=resamples, seed=seed))
        result["kappa_by_category"] = {
            name: _kappa(fleiss_kappa(counts[[c == name for c in categories]], resamples=resamples, seed=seed))
            for name in tallies
        }
    return result


def _counts(votes: Sequence[Sequence[Outcome]]) -> dict[str, int]:
    return {name: sum(found.count(name) for found in votes) for name in OUTCOMES}


def _kappa(found: Kappa) -> dict[str, Any]:
    return dataclasses.asdict(found)
