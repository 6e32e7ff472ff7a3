"""What can be added by one line here, with a file of its own where it needs code. Modules are imported on first use."""

import dataclasses
from typing import Literal

PREFERENCE_LOSSES = {
    "dpo": "mpo_jax.stages.preference.dpo",
    "cdpo": "mpo_jax.stages.preference.cdpo",
    "ipo": "mpo_jax.stages.preference.ipo",
    "simpo": "mpo_jax.stages.preference.simpo",
}
"""What `dpo.loss` may be: a module each, with `loss`, NEEDS_REFERENCE and PER_TOKEN (see mpo_jax.stages.preference)."""

ROW_FORMATS = {
    "hh": "mpo_jax.data.hh",
    "tldr": "mpo_jax.data.tldr",
    "pairs": "mpo_jax.data.records",
    "scored": "mpo_jax.data.scored",
}
"""What `data.kind` may be besides the embedded toy world: a module each, with `FORMAT` (see mpo_jax.data.records)."""

TRAINED = ("sft", "reward", "dpo", "ppo")
"""The stages with a section `train`."""

Subset = Literal["all", "easy", "hard"]
"""Which pairs of a selection a step learns from."""


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

    def needs_reward(self, *, selection_scores: bool) -> bool:
        """Whether a reward model has to be there.

        Args:
          selection_scores: whether the selection scores its pairs with it.
        """
        return self.algorithm == "ppo" or (self.needs_selection and selection_scores)


EXPERIMENTS: dict[str, tuple[Step, ...]] = {
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
"""What `experiment` may name: steps that start from SFT. Table 6 and Figure 4 of the MPO paper."""
