"""PPO's measures on test prompts: scores and KL of samples that are drawn with the same random numbers every time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpo_jax.config.schema import Config
from mpo_jax.data.batches import Buckets, padded_batches
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import tokenize
from mpo_jax.runtime.offload import to_devices
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.training.validation import first_rows, means, only_means
from mpo_jax.types import Params

if TYPE_CHECKING:
    from mpo_jax.stages.ppo import Loop, PpoState

NUM_PROMPTS = 64


def exported(state: "PpoState") -> Params:
    """The policy that the stage exports: the actor, or its average where one is kept."""
    return state.actor.params if state.ema is None else state.ema


def make_evaluate(
    config: Config, codec: TextCodec, loop: "Loop", buckets: Buckets
) -> Callable[["PpoState"], dict[str, float]] | None:
    """From PPO's state to the exported policy's measures on the first test prompts; None where it is never asked.

    It runs the loop's own sampling and scoring, in batches of the stage's size, so that only a prompt that is longer
    than all of training's needs another compilation.

    Args:
      buckets: of the training prompts.
    """
    train = config.ppo.train
    if train.eval_every is None:
        return None
    prompts = first_rows(load_corpus(config).test_prompts, train, "ppo", default=NUM_PROMPTS)
    examples, _ = tokenize(codec, [(prompt, ()) for prompt in prompts], cache=config.runtime.token_cache_folder)
    batches = [batch for _, batch in padded_batches(examples, buckets.widened(examples), train.batch_size)]
    key = stage_key(config.seed, "ppo/eval")

    def evaluate(state: "PpoState") -> dict[str, float]:
        policies = exported(state), to_devices(loop.ref_params)
        judges = state.critic.params, to_devices(loop.reward_params)

        def measure(batch: Any) -> Any:
            rows, visit = place_batch((batch.rows, batch.epoch), loop.mesh)
            joined, has_eos = loop.generate(policies[0], rows, key, visit, loop.allowed_V)
            _, metrics, _ = loop.score(policies, judges, joined, has_eos, loop.allowed_V, state.kl_coef, state.scores)
            return only_means(metrics)

        return means(map(measure, batches))

    return evaluate
