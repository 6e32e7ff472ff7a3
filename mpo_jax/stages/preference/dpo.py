"""DPO. arXiv:2305.18290."""

from mpo_jax.losses import dpo_loss
from mpo_jax.stages.preference import Pairs
from mpo_jax.types import Mean

NEEDS_REFERENCE = True
PER_TOKEN = False


def loss(pairs: Pairs, *, beta: float) -> Mean:
    """-log sigmoid(beta * (policy margin - reference margin)), nats per pair. Eq. 7."""
    return dpo_loss(*pairs.margins, beta=beta, valid_B=pairs.valid)
