"""Functions on loaded models other than training: sample, score, select."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mpo_jax import selection
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.tokens import number_visits, tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.sampling import sample_examples
from mpo_jax.models import forward
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import check_batch, place_batch
from mpo_jax.tools.api.models import LoadedModel
from mpo_jax.tools.api.rows import Pairs, Rows


def sample(
    policy: LoadedModel,
    prompts: Sequence[str] | Rows,
    *,
    num_samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[str]]:
    """Samples `num_samples` responses to each prompt.

    A sample depends only on the prompt, the seed and the sample's index, not on the rest of the batch.

    Args:
      prompts: texts as the model reads them, or rows.
      max_new_tokens: maximum response length; None: the policy's `text.max_response_tokens`.
      batch_size: number of prompts per batch.
    """
    codec = policy.codec
    texts = prompts.prompts if isinstance(prompts, Rows) else prompts
    examples = number_visits(tokenize(codec, [(text, ()) for text in texts])[0])
    sampling = Sampling(max_new_tokens or policy.text.max_response_tokens, num_samples, temperature, top_p, greedy)
    check_batch(batch_size, policy.mesh, "batch_size")
    with jax.set_mesh(policy.mesh):
        found = sample_examples(
            policy.model, policy.params, examples, codec, sampling=sampling, key=stage_key(seed, "sample"),
            batch_size=batch_size, mesh=policy.mesh,
        )  # fmt: skip
    return [
        [codec.decode(row[:n]) for row, n in zip(ids, length, strict=True)]
        for ids, length in zip(found.ids, found.length, strict=True)
    ]


def score(model: LoadedModel, rows: Rows, *, batch_size: int = 8) -> np.ndarray:
    """[E N] float32: a reward model's raw score of each response, or a language model's log-probability in nats."""
    check_batch(batch_size, model.mesh, "batch_size")
    is_reward = "score" in {**model.params["trainable"], **model.params["frozen"]}
    function = (forward.make_score_pairs if is_reward else forward.make_response_logps)(model.model, model.mesh)
    with jax.set_mesh(model.mesh):
        return map_batches(
            rows.examples,
            Buckets.of(rows.examples, model.text.length_buckets),
            batch_size,
            lambda batch: function(model.params, place_batch(batch, model.mesh)),
            models="the model",
        )


def select(
    pairs: Pairs,
    reward: LoadedModel,
    *,
    threshold: float | None = 1.0,
    easy_fraction: float | None = None,
    relabel: bool = False,
    batch_size: int = 8,
) -> tuple[Pairs, Pairs]:
    """Splits pairs into (easy, hard): easy if the reward gap exceeds the threshold. Section 3.1 of arXiv:2403.19443.

    Args:
      threshold: gap above which a pair is easy; a gap equal to it is hard.
      easy_fraction: fraction of the pairs that is easy, instead of a threshold.
      relabel: whether the response with the higher score becomes the chosen one, as for sampled pairs, so gaps are
        never negative. Otherwise labels stay, and a pair that the reward model orders the other way has a negative gap.

    Returns:
      Both parts with `gap` set, in the original order.

    Raises:
      UserError: if there is neither a threshold nor an easy_fraction in [0, 1].
    """
    if threshold is None and easy_fraction is None:
        raise UserError("select needs a threshold or an easy_fraction")
    if easy_fraction is not None and not 0.0 <= easy_fraction <= 1.0:
        raise UserError(f"easy_fraction={easy_fraction} must lie in [0, 1]")
    score_BN = score(reward, pairs, batch_size=batch_size)
    gap = score_BN[:, 0] - score_BN[:, 1]
    if relabel:
        swap = gap < 0
        examples = [
            dataclasses.replace(e, responses=e.responses[::-1]) if s else e
            for e, s in zip(pairs.examples, swap, strict=True)
        ]
        texts = [pair[::-1] if s else pair for pair, s in zip(pairs.responses, swap, strict=True)]
        pairs, gap = dataclasses.replace(pairs, examples=examples, responses=texts), np.abs(gap)
    pairs = dataclasses.replace(pairs, gap=gap)
    border = threshold if easy_fraction is None else selection.threshold_for_fraction(gap, easy_fraction)
    assert border is not None
    easy = np.asarray(selection.split(gap, border))
    return pairs.take(np.flatnonzero(easy)), pairs.take(np.flatnonzero(~easy))
