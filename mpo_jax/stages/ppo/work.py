"""How long an iteration's arithmetic takes at the devices' peak: PPO's part of `perf/mfu`."""

from collections.abc import Callable
from functools import lru_cache

import jax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mpo_jax.models import flops
from mpo_jax.models.forward import Model
from mpo_jax.runtime.sharding import replicated


@lru_cache
def make_at_peak(actor: Model, critic: Model, peak: float, mesh: Mesh, *, scores: bool) -> Callable[..., Array]:
    """A jitted (prompt_len, response_len, actor's epochs, critic's epochs) -> seconds.

    On the devices, since the host does not wait for the lengths of responses.

    Args:
      peak: FLOP/s of all devices.
      scores: whether there is a reward model of the critic's sizes.
    """

    def at_peak(
        prompt_len_B: Int[Array, " B"], response_len_BN: Int[Array, "B N"], actor_epochs: float, critic_epochs: float
    ) -> Float[Array, ""]:
        work = flops.ppo_iteration(
            actor.decoder, critic.decoder, prompt_len_B, response_len_BN, actor_epochs=actor_epochs,
            critic_epochs=critic_epochs, adapters=actor.adapter is not None, scores=scores,
        )  # fmt: skip
        return jax.numpy.asarray(work) / peak

    return jax.jit(at_peak, out_shardings=replicated(mesh))
