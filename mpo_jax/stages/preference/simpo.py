"""SimPO: the mean log-probability per token as reward, a target margin, no reference model. arXiv:2405.14734."""

import jax
import jax.numpy as jnp

from mpo_jax.stages.preference import Pairs
from mpo_jax.types import Mean

NEEDS_REFERENCE = False
PER_TOKEN = True


def loss(pairs: Pairs, *, beta: float, target_margin: float = 1.0) -> Mean:
    """-log sigmoid(beta * (log p(chosen) / |chosen| - log p(rejected) / |rejected|) - margin), nats per pair. Eq. 6.

    The paper uses beta from 2 to 10 and a margin (there called gamma) from 0.3 to 1.6.
    """
    margin_B = beta * (pairs.logp[:, 0] - pairs.logp[:, 1]) - target_margin
    # mask the inputs, not only the sum: a NaN in a padding row would reach the gradient
    return Mean.of(-jax.nn.log_sigmoid(jnp.where(pairs.valid, margin_B, 0.0)), pairs.valid)
