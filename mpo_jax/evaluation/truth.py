"""The true utility of what PPO samples, where a truth is known: how far the reward can be pushed before it misleads."""

from collections.abc import Callable

import numpy as np

from mpo_jax.data.text import TextCodec
from mpo_jax.runtime.processes import to_host
from mpo_jax.types import Mean, PromptBatch

Truth = Callable[[str, str], float]


def make_rollout_utility(truth: Truth | None, codec: TextCodec) -> Callable[[PromptBatch], dict[str, Mean]]:
    """A function from a batch of responses to its metric `objective/utility`, or to none where no truth is known.

    It fetches the batch to the host, so an iteration waits for its samples; without a truth nothing is fetched.
    """
    if truth is None:
        return lambda joined: {}

    def measure(joined: PromptBatch) -> dict[str, Mean]:
        prompt, prompt_len, response, response_len = map(
            to_host, (joined.prompt, joined.prompt_len, joined.response, joined.response_len)
        )
        # rows without a prompt only fill the batch
        values = [
            truth(codec.decode(prompt[row, : prompt_len[row]]), codec.decode(response[row, 0, : response_len[row, 0]]))
            for row in np.flatnonzero(prompt_len > 0)
        ]
        return {"objective/utility": Mean(np.float32(sum(values)), np.float32(len(values)))}  # type: ignore[arg-type]

    return measure
