"""The paper's numbers and claims, as data: they are shown beside ours and never asserted.

Source: "Mixed Preference Optimization", arXiv:2403.19443, LLaMA-2-7B on HH-RLHF and TL;DR. A cell that is not
known here is empty.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reported:
    """A number of the paper on each of its data sets, None where it gives none or none is known here."""

    hh: float | None = None
    tldr: float | None = None

    def cells(self) -> dict[str, Any]:
        """The two columns of a table."""
        return {"paper_hh": self.hh, "paper_tldr": self.tldr}

    def __sub__(self, other: "Reported") -> "Reported":
        def difference(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else round(a - b, 3)

        return Reported(difference(self.hh, other.hh), difference(self.tldr, other.tldr))


NOTHING = Reported()

SIZES = {
    "HH-RLHF helpful": (43774, 2352),
    "HH-RLHF harmless": (42537, 2312),
    "TL;DR demonstrations": (116722, 6553),
    "TL;DR preferences": (178944, 6553),
}
"""Table 1: training and test rows."""

REWARD_ACCURACY = Reported(0.73, 0.78)
"""Table 2: share of test pairs that the reward model orders as people did."""

MEAN_REWARD = {
    "sft": Reported(0.938, 1.108),
    "dpo_base": Reported(1.499, 2.911),
    "dpo": Reported(1.859, 2.816),
    "ppo": Reported(2.513, 3.460),
}
"""Table 3: mean reward on test prompts, of the runs that do not depend on the split."""

MPO_REWARD = {1.0: Reported(2.801, 3.784), 2.0: Reported(2.22, 3.569)}
"""Table 3: MPO's mean reward by threshold."""

VARIANT_REWARD = {
    "mpo": Reported(hh=2.80),
    "ppo": Reported(hh=2.513),
    "mpo_reverse": Reported(hh=2.32),
    "mpo_sft_kl": Reported(hh=1.915),
    "mpo_reverse_sft": Reported(hh=1.88),
}
"""Table 6: mean reward of the variants, HH-RLHF alone."""

JUDGED = {"HH-RLHF": (0.386, 0.390, 0.224), "TL;DR": (0.640, 0.262, 0.094)}
"""Table 4: GPT-4's verdicts on MPO at threshold 1 against PPO: shares of win, tie, lose."""

HUMAN = {"helpful": (93, 29, 28, 0.55), "harmless": (24, 117, 9, 0.52)}
"""Table 5: people's votes on MPO against PPO, HH-RLHF: win, tie, lose of 150 (62.0%, 19.3%, 18.7%, and 16.0%, 78.0%,
6.0%: three people's on 50 items each), and Fleiss' kappa."""

CONTRADICTION = (
    "The paper contradicts itself on thresholds: the header and the caption of its Table 5 name different ones, and "
    "its easy sets at 1.0 and 2.0 have sizes that its own rule, easy above the threshold, cannot give."
)

SUBSET_REWARD = {"dpo_easy": Reported(hh=1.907), "dpo": Reported(hh=1.859)}
"""Figure 4: DPO on the 20K easy pairs and on all 80K, HH-RLHF."""

GAPS = (
    "Paper: more than half of the HH-RLHF pairs have a gap between 0 and 1, and accuracy rises with the gap (Figure 2)."
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper: one run's mean reward is above another's.

    Attributes:
      text: the claim in words.
      source: table or figure.
      better: the run that is above,
      worse: the one that is below, by their names.
      paper: the paper's difference of the two; of MPO at threshold 1 where it has several.
      by_split: the difference at other splits, by the split's label.
    """

    text: str
    source: str
    better: str
    worse: str
    paper: Reported
    by_split: Mapping[str, Reported] = dataclasses.field(default_factory=dict)

    def at(self, split: str) -> Reported:
        """The paper's difference at a split."""
        return self.by_split.get(split, self.paper)


def _mpo_claim(worse: str, name: str) -> Claim:
    """MPO, which the paper has at two thresholds, is better than a run that depends on none."""
    by_split = {f"threshold {threshold:g}": mpo - MEAN_REWARD[worse] for threshold, mpo in MPO_REWARD.items()}
    return Claim(f"MPO better than {name}", "Table 3", "mpo", worse, by_split["threshold 1"], by_split)


CLAIMS = (
    Claim("DPO better than DPO-base", "Table 3", "dpo", "dpo_base", MEAN_REWARD["dpo"] - MEAN_REWARD["dpo_base"]),
    Claim("PPO better than DPO", "Table 3", "ppo", "dpo", MEAN_REWARD["ppo"] - MEAN_REWARD["dpo"]),
    _mpo_claim("dpo", "DPO"),
    _mpo_claim("ppo", "PPO"),
    Claim("reverse worse than PPO", "Table 6", "ppo", "mpo_reverse",
          VARIANT_REWARD["ppo"] - VARIANT_REWARD["mpo_reverse"]),
    Claim("sft-kl drops", "Table 6", "mpo", "mpo_sft_kl", VARIANT_REWARD["mpo"] - VARIANT_REWARD["mpo_sft_kl"]),
    Claim("reverse better than reverse-sft", "Table 6", "mpo_reverse", "mpo_reverse_sft",
          VARIANT_REWARD["mpo_reverse"] - VARIANT_REWARD["mpo_reverse_sft"]),
    Claim("DPO on the easy pairs better than on all", "Figure 4", "dpo_easy", "dpo",
          SUBSET_REWARD["dpo_easy"] - SUBSET_REWARD["dpo"]),
    Claim("DPO on the easy pairs better than on the hard", "Figure 4", "dpo_easy", "dpo_hard", NOTHING),
    Claim("PPO on all prompts better than on the easy", "Figure 4", "ppo", "ppo_easy", NOTHING),
    Claim("PPO on the easy prompts better than on the hard", "Figure 4", "ppo_easy", "ppo_hard", NOTHING),
)  # fmt: skip
"""All but those between thresholds, which depend on what was run; each is tested at every split that was run. The
paper draws PPO's bars of Figure 4 without numbers. On TL;DR the paper's own DPO is below its DPO-base, and on
HH-RLHF its MPO at threshold 2 is below PPO."""


def threshold_claim(lower: float, higher: float, better: str, worse: str) -> Claim:
    """MPO with the lower of two thresholds is better: the paper's MPO(1) against MPO(2), or two others."""
    paper = MPO_REWARD.get(lower, NOTHING) - MPO_REWARD.get(higher, NOTHING)
    return Claim(f"MPO({lower:g}) better than MPO({higher:g})", "Table 3", better, worse, paper)


def fraction_claim(larger: float, smaller: float, better: str, worse: str) -> Claim:
    """The same where splits are named by the share of easy pairs: a lower threshold is a larger share."""
    text = f"MPO({larger:.0%} easy) better than MPO({smaller:.0%} easy)"
    return Claim(text, "Table 3, by shares", better, worse, NOTHING)
