"""The paper's numbers and claims, as data: they are shown beside ours and never asserted.

Source: "Mixed Preference Optimization", arXiv:2403.19443, LLaMA-2-7B on HH-RLHF and TL;DR. A cell that is not
known here is empty.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reported:
    """A number of the paper on each of its data sets, None where it gives none or none is known here."""

    hh: float | None = None
    tldr: float | None = None

    def cells(self, name: str = "paper") -> dict[str, Any]:
        """The two columns of a table."""
        return {f"{name}_hh": self.hh, f"{name}_tldr": self.tldr}

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

HUMAN = {"helpful": (0.620, 0.193, 0.187, 0.55), "harmless": (0.160, 0.780, 0.060, 0.52)}
"""Table 5: people's verdicts on MPO against PPO, HH-RLHF: shares of win, tie, lose, and Fleiss' kappa."""

SUBSET_REWARD = {"dpo_easy": Reported(hh=1.907), "dpo": Reported(hh=1.859)}
"""Figure 4: DPO on the 20K easy pairs and on all 80K, HH-RLHF."""

GAPS = (
    "Paper: more than half of the HH-RLHF pairs have a gap between 0 and 1, and accuracy rises with the gap (Figure 2)."
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """The paper says that one run's mean reward is above another's.

    Attributes:
      text: the claim in words.
      source: table or figure.
      better: the run that is above,
      worse: the one that is below, by their names.
      paper: the paper's difference of the two.
    """

    text: str
    source: str
    better: str
    worse: str
    paper: Reported


CLAIMS = (
    Claim("DPO better than DPO-base", "Table 3", "dpo", "dpo_base", MEAN_REWARD["dpo"] - MEAN_REWARD["dpo_base"]),
    Claim("PPO better than DPO", "Table 3", "ppo", "dpo", MEAN_REWARD["ppo"] - MEAN_REWARD["dpo"]),
    Claim("MPO better than DPO", "Table 3", "mpo", "dpo", MPO_REWARD[1.0] - MEAN_REWARD["dpo"]),
    Claim("MPO better than PPO", "Table 3", "mpo", "ppo", MPO_REWARD[1.0] - MEAN_REWARD["ppo"]),
    Claim("reverse worse than PPO", "Table 6", "ppo", "mpo_reverse",
          VARIANT_REWARD["ppo"] - VARIANT_REWARD["mpo_reverse"]),
    Claim("sft-kl drops", "Table 6", "mpo", "mpo_sft_kl", VARIANT_REWARD["mpo"] - VARIANT_REWARD["mpo_sft_kl"]),
    Claim("DPO on the easy pairs better than on all", "Figure 4", "dpo_easy", "dpo",
          SUBSET_REWARD["dpo_easy"] - SUBSET_REWARD["dpo"]),
)  # fmt: skip
"""All but those on thresholds, which depend on what was run. On TL;DR the paper's own DPO is below its DPO-base, and on
HH-RLHF its MPO at threshold 2 is below PPO."""


def threshold_claim(lower: float, higher: float, better: str, worse: str) -> Claim:
    """MPO with the lower of two thresholds is better: the paper's MPO(1) against MPO(2), or two others."""
    paper = MPO_REWARD.get(lower, NOTHING) - MPO_REWARD.get(higher, NOTHING)
    return Claim(f"MPO({lower:g}) better than MPO({higher:g})", "Table 3", better, worse, paper)


def fraction_claim(larger: float, smaller: float, better: str, worse: str) -> Claim:
    """The same where splits are named by the share of easy pairs: a lower threshold is a larger share."""
    text = f"MPO({larger:.0%} easy) better than MPO({smaller:.0%} easy)"
    return Claim(text, "Table 3, by shares", better, worse, NOTHING)
