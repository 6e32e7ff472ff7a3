"""The named runs of the paper: each a list of steps that start from SFT. Table 6 and Figure 4 of the MPO paper."""

import dataclasses
from typing import Literal

from mpo_jax.config import ExperimentName
from mpo_jax.data.pair_table import Subset


@dataclasses.dataclass(frozen=True)
class Step:
    """One preference-learning step.

    Attributes:
      algorithm: dpo or ppo.
      subset: which pairs (dpo) or prompts (ppo) of the selection.
      reference: the policy that the step starts from, or SFT whatever it starts from.
      human_pairs: dpo on the labelled pairs instead of the sampled ones, without a threshold.
    """

    algorithm: Literal["dpo", "ppo"]
    subset: Subset = "all"
    reference: Literal["init", "sft"] = "init"
    human_pairs: bool = False

    @property
    def needs_selection(self) -> bool:
        return not self.human_pairs and not (self.algorithm == "ppo" and self.subset == "all")


EXPERIMENTS: dict[ExperimentName, tuple[Step, ...]] = {
    "sft": (),
    "dpo_base": (Step("dpo", human_pairs=True),),
    "dpo": (Step("dpo"),),
    "ppo": (Step("ppo"),),
    "mpo": (Step("dpo", "easy"), Step("ppo", "hard")),
    "mpo_sft_kl": (Step("dpo", "easy"), Step("ppo", "hard", reference="sft")),
    "mpo_reverse": (Step("ppo", "hard"), Step("dpo", "easy")),
    "mpo_reverse_sft": (Step("ppo", "hard"), Step("dpo", "easy", reference="sft")),
    "dpo_easy": (Step("dpo", "easy"),),
    "dpo_hard": (Step("dpo", "hard"),),
    "ppo_easy": (Step("ppo", "easy"),),
    "ppo_hard": (Step("ppo", "hard"),),
}
