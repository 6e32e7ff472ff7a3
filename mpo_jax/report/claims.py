"""The paper's claims, tested on our runs: paired over prompts and seeds, corrected for their number."""

from itertools import pairwise
from typing import Any

import numpy as np

from mpo_jax.evaluation.statistics import LEVEL, bootstrap_p, holm, resampled_means, verdict
from mpo_jax.report.paper import CLAIMS, Claim, fraction_claim, threshold_claim
from mpo_jax.report.seeds import BySeed, Rows, differences, of_run, run_names

COMPARED = ("score", "utility")

RULE = (
    "Rule: a claim is supported where the difference has the claimed sign and its Holm-adjusted p-value is below "
    f"{LEVEL:g}, contradicted where it has the opposite sign and p below {LEVEL:g}, else undecided. p is two-sided, "
    "from a bootstrap of the differences paired by prompt; Holm's correction is over all claims on the same measure."
)


def unit(by_seed: BySeed) -> str:
    """What the bootstrap resamples, and how far that carries, in a sentence."""
    if len(by_seed) == 1:
        return (
            "One seed: only prompts are resampled. Intervals and p-values hold for these trained models, and say "
            "nothing of what another seed would give."
        )
    sentence = f"{len(by_seed)} seeds: the bootstrap resamples seeds, and prompts within each."
    if len(by_seed) < 5:
        sentence += " So few seeds make its intervals too narrow."
    return sentence


def claims_of(by_seed: BySeed) -> list[Claim]:
    """The claims whose two runs are there, and those between MPO's neighbouring splits."""
    names = run_names(by_seed)
    claims = [claim for claim in CLAIMS if claim.better in names and claim.worse in names]
    thresholds: dict[float, str] = {}
    fractions: dict[float, str] = {}
    for name in names:
        result = next(iter(of_run(by_seed, name).values()))
        if result.experiment != "mpo":
            continue
        select = result.config.select
        if select.easy_fraction is not None:
            fractions.setdefault(select.easy_fraction, name)
        elif select.threshold is not None:
            thresholds.setdefault(select.threshold, name)
    claims += [
        threshold_claim(low, high, thresholds[low], thresholds[high]) for low, high in pairwise(sorted(thresholds))
    ]
    claims += [
        fraction_claim(large, small, fractions[large], fractions[small])
        for large, small in pairwise(sorted(fractions, reverse=True))
    ]
    return claims


def claim_rows(by_seed: BySeed, *, resamples: int, seed: int = 0) -> Rows:
    """A row a claim and measure, with the difference, its 95% percentile interval, p-values and verdict.

    The measures are the reward and, where it is known, the true utility; each is a family of its own to Holm.
    """
    rows: Rows = []
    for column in COMPARED:
        family: Rows = []
        for claim in claims_of(by_seed):
            groups = differences(by_seed, claim.better, claim.worse, column)
            if groups:
                family.append(_row(claim, column, groups, resamples, seed))
        for row, adjusted in zip(family, holm([row["p"] for row in family]), strict=True):
            row |= {"p_holm": adjusted, "verdict": verdict(row["difference"], adjusted)}
            # the verdict is what people look for, the paper's numbers are beside it
            row |= {key: row.pop(key) for key in ("paper_hh", "paper_tldr")}
        rows += family
    return rows


def _row(claim: Claim, column: str, groups: list[np.ndarray], resamples: int, seed: int) -> dict[str, Any]:
    mean_R = resampled_means(groups, resamples=resamples, seed=seed)
    low, high = np.percentile(mean_R, [2.5, 97.5])
    return {
        "claim": claim.text,
        "source": claim.source,
        "better": claim.better,
        "worse": claim.worse,
        "measure": {"score": "reward", "utility": "true utility"}[column],
        "seeds": len(groups),
        "prompts": sum(map(len, groups)),
        "difference": float(np.mean([group.mean() for group in groups])),
        "ci_low": float(low),
        "ci_high": float(high),
        "p": bootstrap_p(mean_R),
        # a difference in the paper is of rewards: it says nothing of a utility
        **(claim.paper.cells() if column == "score" else {"paper_hh": None, "paper_tldr": None}),
    }
