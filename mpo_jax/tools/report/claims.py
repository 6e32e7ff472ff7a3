"""The paper's claims, tested on our runs: paired over prompts and seeds, corrected for their number."""

import dataclasses
from itertools import pairwise
from typing import Any

from mpo_jax.config.registry import EXPERIMENTS
from mpo_jax.evaluation.statistics import LEVEL, holm, verdict
from mpo_jax.tools.report.paper import CLAIMS, Claim, fraction_claim, threshold_claim
from mpo_jax.tools.report.results import split_label
from mpo_jax.tools.report.seeds import BySeed, Repeated, Rows, differences, of_run, run_names, share_prompts

COMPARED = ("score", "utility")
TOO_FEW = "too few prompts"
"""Shown in place of a verdict."""

RULE = (
    "Rule: a claim is supported where the difference has the claimed sign and its Holm-adjusted p-value is below "
    f"{LEVEL:g}, contradicted where it has the opposite sign and p below {LEVEL:g}, else undecided. p is two-sided, "
    "from a bootstrap of the differences paired by prompt; Holm's correction is over all claims on the same measure."
)


COVERAGE = {2: "88%", 3: "89%", 4: "90%"}
"""By number of seeds with prompts of their own, the coverage of nominal 95% intervals if seeds differ and the prompts'
noise hides it: the lowest of the simulations in the docstring of `evaluation.statistics.paired_bootstrap`. Of seeds
that share their prompts it is 94% or more."""


def unit(by_seed: BySeed) -> str:
    """What is resampled, and the limits of the intervals, in sentences."""
    seeds = len(by_seed)
    if seeds == 1:
        return (
            "One seed: only prompts are resampled. Intervals and p-values hold for these trained models, and say "
            "nothing of what another seed would give."
        )
    design = "each seed has test prompts of its own (nested), which are resampled within it"
    if share_prompts(by_seed):
        design = "all seeds share their test prompts (crossed), so one draw of prompts serves them all"
    sentence = (
        f"{seeds} seeds: {design}; to that is added what seeds differ beyond it, by Student's t with {seeds - 1} "
        f"degree{'s' * (seeds > 2)} of freedom."
    )
    if seeds in COVERAGE and not share_prompts(by_seed):
        sentence += (
            f" What {seeds} seeds cannot tell is how much seeds differ: a spread of about the prompts' noise is easily "
            f"missed, and then a 95% interval holds in about {COVERAGE[seeds]} of cases. Five seeds or more repair "
            "that."
        )
    return f"{sentence} {common}" if (common := shared_models(by_seed)) else sentence


def shared_models(by_seed: BySeed) -> str:
    """A sentence on the models that all of several seeds share; empty where each has its own."""
    if len(by_seed) == 1:
        return ""
    every = [result for results in by_seed.values() for result in results]
    made = {role: {run.artifacts[role].id for run in every if role in run.artifacts} for role in ("sft", "reward")}
    finished = all(run.config.reward.path is not None for run in every)
    shares = {"SFT model": len(made["sft"]) == 1, "reward model": len(made["reward"]) == 1 or finished}
    common = " and one ".join(name for name, shared in shares.items() if shared)
    return f"All seeds share one {common}: what others would give is in no interval or error here." if common else ""


def claims_of(by_seed: BySeed) -> list[Claim]:
    """The claims whose two runs are there, at every split that was run, and those between MPO's neighbouring splits."""
    at: dict[str, dict[str, str]] = {}
    thresholds: dict[float, str] = {}
    fractions: dict[float, str] = {}
    whole: dict[str, str] = {}
    for name in run_names(by_seed):
        result = next(iter(of_run(by_seed, name).values()))
        if not depends_on_split(result.experiment):
            whole[result.experiment] = name
            continue
        select = result.config.select
        at.setdefault(split_label(select), {}).setdefault(result.experiment, name)
        if result.experiment == "mpo" and select.easy_fraction is not None:
            fractions.setdefault(select.easy_fraction, name)
        elif result.experiment == "mpo" and select.threshold is not None:
            thresholds.setdefault(select.threshold, name)
    claims = [one for claim in CLAIMS for one in _at_splits(claim, whole, at)]
    claims += [
        threshold_claim(low, high, thresholds[low], thresholds[high]) for low, high in pairwise(sorted(thresholds))
    ]
    claims += [
        fraction_claim(large, small, fractions[large], fractions[small])
        for large, small in pairwise(sorted(fractions, reverse=True))
    ]
    return claims


def depends_on_split(experiment: str) -> bool:
    """Whether what the experiment trains on depends on where pairs are split."""
    return any(step.subset != "all" for step in EXPERIMENTS[experiment])  # type: ignore[index]


def _at_splits(claim: Claim, whole: dict[str, str], at: dict[str, dict[str, str]]) -> list[Claim]:
    """The claim between runs: once, or at every split that has both, whose name it bears where there are several."""
    if not depends_on_split(claim.better) and not depends_on_split(claim.worse):
        at = {"": {}}
    found = {split: whole | own for split, own in at.items() if {claim.better, claim.worse} <= {*whole, *own}}
    several = len(found) > 1
    return [
        dataclasses.replace(
            claim, text=f"{claim.text}, {split}" if several else claim.text, better=runs[claim.better],
            worse=runs[claim.worse], paper=claim.at(split),
        )
        for split, runs in found.items()
    ]  # fmt: skip


def claim_rows(by_seed: BySeed, *, resamples: int, at_least: int = 1) -> Rows:
    """A row a claim and measure, with the difference, its 95% interval, p-values and verdict.

    The measures are the reward and, where it is known, the true utility; each is a family of its own to Holm.

    Args:
      at_least: prompts; a claim over fewer is not tested, and counts in no family.
    """
    rows: Rows = []
    for column in COMPARED:
        found = [(claim, differences(by_seed, claim.better, claim.worse, column)) for claim in claims_of(by_seed)]
        family = [_row(claim, column, paired, resamples) for claim, paired in found if paired is not None]
        tested = [row for row in family if row["prompts"] >= at_least]
        for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row |= {"p_holm": adjusted, "verdict": verdict(row["difference"], adjusted)}
        for row in family:
            if "verdict" not in row:
                row |= {"ci_low": None, "ci_high": None, "p": None, "p_holm": None, "verdict": TOO_FEW}
            # readers look for the verdict; the paper's numbers come last
            row |= {key: row.pop(key) for key in ("paper_hh", "paper_tldr")}
        rows += family
    return rows


def _row(claim: Claim, column: str, paired: Repeated, resamples: int) -> dict[str, Any]:
    mean, low, high, p = paired.interval(resamples=resamples)
    return {
        "claim": claim.text,
        "source": claim.source,
        "better": claim.better,
        "worse": claim.worse,
        "measure": {"score": "reward", "utility": "true utility"}[column],
        "seeds": len(paired.groups),
        "prompts": paired.num_prompts,
        "difference": mean,
        "ci_low": low,
        "ci_high": high,
        "p": p,
        # the paper's differences are of rewards, not of utilities
        **(claim.paper.cells() if column == "score" else {"paper_hh": None, "paper_tldr": None}),
    }
