"""IPO. arXiv:2310.12036."""

from mpo_jax.losses import ipo_loss
from mpo_jax.stages.preference import Pairs
from mpo_jax.types import Mean

NEEDS_REFERENCE = True
PER_TOKEN = False


def loss(pairs: Pairs, *, beta: float) -> Mean:
    """(policy margin - reference margin - 1 / (2 beta))^2 per pair. Eq. 17."""
    return ipo_loss(*pairs.margins, beta=beta, valid_B=pairs.valid)
