"""Win rates between runs: by their own rewards, and by results of `mpo judge` and `mpo human import` in a workdir."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.errors import UserError
from mpo_jax.evaluation.verdicts import OUTCOMES
from mpo_jax.tools.report.seeds import BySeed, Rows, differences
from mpo_jax.untrusted import loads, read_text


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Results as the two commands wrote them, by file."""

    judged: dict[Path, dict[str, Any]] = dataclasses.field(default_factory=dict)
    human: dict[Path, dict[str, Any]] = dataclasses.field(default_factory=dict)


def find_verdicts(workdir: Path) -> Verdicts:
    """All results in `<workdir>/judge` and `<workdir>/human`, at any depth.

    Raises:
      UserError: for a file that neither command can have written.
    """
    return Verdicts(_read(workdir / "judge", "judge"), _read(workdir / "human", "annotators"))


def _read(folder: Path, key: str) -> dict[Path, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("**/result.json")):
        result: Any = None
        text = read_text(path)
        try:
            result = loads(text)
            whole = {"a", "b", key} <= result.keys() and set(OUTCOMES) <= result["verdict"]["rates"].keys()
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{path}: no result of mpo {folder.name}: make it again, or move it out of this folder")
        found[path] = result
    return found


def judge_rows(results: dict[Path, dict[str, Any]]) -> Rows:
    """A row a result and category."""
    rows: Rows = []
    for result in results.values():
        for category, tally in _tallies(result).items():
            unparsed = {"unparsed": result.get("unparsed"), "failed": result.get("failed")} if category is None else {}
            rows.append(
                {**_sides(result), "judge": result["judge"], "category": category, **_shares(tally), **unparsed}
            )
    return rows


def human_rows(results: dict[Path, dict[str, Any]]) -> Rows:
    """A row a study and category, with the agreement of those who judged."""
    rows: Rows = []
    for result in results.values():
        for category, tally in _tallies(result).items():
            kappas = result.get("kappa_by_category", {})
            kappa = result.get("kappa") if category is None else kappas.get(category)
            agreement = {}
            if kappa is not None:
                agreement = {"fleiss_kappa": kappa["value"], "fleiss_kappa_low": kappa["low"]}
                agreement |= {"fleiss_kappa_high": kappa["high"], "agreement": kappa["band"]}
            votes = result.get("votes") if category is None else result.get("votes_by_category", {}).get(category)
            people = {"people": result["annotators"]} | (vote_shares(votes) if votes else {})
            rows.append({**_sides(result), "category": category, **people, **_shares(tally), **agreement})
    return rows


def vote_shares(votes: Mapping[str, int]) -> dict[str, Any]:
    """The number of votes and the share of each outcome among them."""
    total = sum(votes[outcome] for outcome in OUTCOMES)
    return {"votes": total} | {f"votes_{outcome}": votes[outcome] / total for outcome in OUTCOMES}


def reward_rows(by_seed: BySeed, first: str, second: str) -> Rows:
    """One run against another by each column of the evaluation: shares of prompts, the mean over seeds."""
    rows: Rows = []
    for column, judge in (("score", "own reward model"), ("utility", "true utility")):
        found = differences(by_seed, first, second, column)
        if found is not None:
            shares = {
                name: float(np.mean([(np.sign(x_P) == wanted).mean() for x_P in found.groups]))
                for name, wanted in zip(OUTCOMES, (1, 0, -1), strict=True)
            }
            items = sum(map(len, found.groups))
            rows.append({"of": "ours", "a": first, "b": second, "judge": judge, "items": items, **shares})
    return rows


def verdict_rows(verdicts: Verdicts) -> dict[str, Rows]:
    """The rows of judges and of people by title; nothing where there are none."""
    rows = {"By judges": judge_rows(verdicts.judged), "By people": human_rows(verdicts.human)}
    return {
        title: [{k: v for k, v in row.items() if k != "of"} for row in part] for title, part in rows.items() if part
    }


def _tallies(result: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
    """Each category's, and under None that of all."""
    return {None: result["verdict"], **result.get("by_category", {})}


def _shares(tally: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"items": sum(tally[outcome] for outcome in OUTCOMES)}
    for outcome in OUTCOMES:
        rate = tally["rates"][outcome] or dict.fromkeys(("value", "low", "high"))
        row |= {outcome: rate["value"], f"{outcome}_low": rate["low"], f"{outcome}_high": rate["high"]}
    return row


def _sides(result: dict[str, Any]) -> dict[str, Any]:
    return {"of": "ours", "a": side_name(result["a"]), "b": side_name(result["b"])}


def side_name(side: str) -> str:
    """A run by its name, in a table's seed with that, and everything else as it was given.

    `runs/x/seed-0/runs/mpo` is `mpo, seed-0`.
    """
    parts = Path(side).parts
    if len(parts) < 2 or parts[-2] != "runs":
        return side
    seed = parts[-3] if len(parts) > 2 and parts[-3].startswith("seed-") else None
    return parts[-1] if seed is None else f"{parts[-1]}, {seed}"
