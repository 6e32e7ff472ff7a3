"""The true utility of PPO's samples, if a truth is known: it shows when a higher reward begins to mislead."""

from collections.abc import Callable

import numpy as np

from mpo_jax.data.text import TextCodec
from mpo_jax.runtime.processes import to_host
from mpo_jax.types import Mean, PromptBatch

Truth = Callable[[str, str], float]


def make_rollout_utility(truth: Truth | None, codec: TextCodec) -> Callable[[PromptBatch], dict[str, Mean]]:
    """A function from a batch of responses to the metric `objective/utility`, or to no metric if no truth is known.

    It fetches the batch, so that an iteration waits for its samples; without a truth it fetches nothing.
    """
    if truth is None:
        return lambda joined: {}

    def measure(joined: PromptBatch) -> dict[str, Mean]:
        prompt, prompt_len, response, response_len = map(
            to_host, (joined.prompt, joined.prompt_len, joined.response, joined.response_len)
        )
        # rows without a prompt are fillers
        values = [
            truth(codec.decode(prompt[row, : prompt_len[row]]), codec.decode(response[row, 0, : response_len[row, 0]]))
            for row in np.flatnonzero(prompt_len > 0)
        ]
        return {"objective/utility": Mean(np.float32(sum(values)), np.float32(len(values)))}  # type: ignore[arg-type]

    return measure
