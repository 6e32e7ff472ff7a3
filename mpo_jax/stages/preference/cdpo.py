"""Conservative DPO, for noisy labels. Note of E. Mitchell, 2023."""

from mpo_jax.losses import cdpo_loss
from mpo_jax.stages.preference import Pairs
from mpo_jax.types import Mean

NEEDS_REFERENCE = True
PER_TOKEN = False


def loss(pairs: Pairs, *, beta: float, label_smoothing: float = 0.1) -> Mean:
    """DPO loss that assumes a fraction `label_smoothing` of the labels to be flipped, nats per pair."""
    return cdpo_loss(*pairs.margins, beta=beta, label_smoothing=label_smoothing, valid_B=pairs.valid)
