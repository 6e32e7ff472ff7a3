"""PPO's evaluation on test prompts: scores and KL of samples drawn with the same random numbers every time."""

from collections.abc import Callable
from typing import Any

from mpo_jax.data.batches import Batch, Buckets, padded_batches
from mpo_jax.data.packing import lengths_of
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages.context import Context
from mpo_jax.stages.ppo.iteration import Loop, PpoState
from mpo_jax.stages.ppo.layout import make_lay_out
from mpo_jax.training.validation import first_rows, means, only_means
from mpo_jax.types import Params

NUM_PROMPTS = 64


def exported(state: PpoState, loop: Loop) -> Params:
    """The policy that the stage exports: the actor, or its moving average if one is kept."""
    trainable = state.actor.trainable if state.ema is None else state.ema
    return {"trainable": trainable, "frozen": loop.models.actor_frozen}


def make_evaluate(
    loop: Loop, context: Context, buckets: Buckets, batch_size: int
) -> Callable[[PpoState], dict[str, float]] | None:
    """Returns a function from PPO's state to the exported policy's metrics on the first test prompts.

    None if `eval_every` is None. The function runs the loop's own sampling and scoring in batches of the stage's size,
    so only prompts longer than all training prompts need another compilation.

    Args:
      buckets: buckets of the training prompts.
    """
    if context.watch.eval_every is None:
        return None
    prompts = first_rows(context.inputs.corpus.test_prompts, context.watch, "ppo", default=NUM_PROMPTS)
    examples, _ = context.tokenize(loop.codec, [(prompt, ()) for prompt in prompts])
    batches = list(padded_batches(examples, buckets.widened(examples), batch_size))
    key, packing = stage_key(loop.settings.seed, "ppo/eval"), loop.packing
    if packing is not None:
        packing = packing.holding(int(lengths_of(examples).max()) + loop.settings.text.max_response_tokens)
    lay_out = make_lay_out(loop.settings.method, packing, loop.mesh)

    def evaluate(state: PpoState) -> dict[str, float]:
        policy = exported(state, loop)

        def measure(batch: Batch) -> Any:
            rows, visit = place_batch((batch.rows, batch.epoch), loop.mesh)
            joined, has_eos = loop.generate(policy, rows, key, visit, loop.allowed_V)
            shown = [None if number < 0 else prompts[int(number)] for number in batch.example]
            _, metrics, _ = loop.score(loop.models, policy["trainable"], state, lay_out(joined), has_eos, shown)
            return only_means(metrics)

        return means(map(measure, batches))

    return evaluate
