"""Functions on loaded models other than training: sample, score, select."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mpo_jax import selection
from mpo_jax.data.tokens import number_visits, tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.sampling import sample_examples
from mpo_jax.evaluation.scoring import score_examples
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.tools.api.models import LoadedModel, check_lengths, check_same_tokens
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
    policy.check_head("lm", "policy")
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of texts, not one text")
    if num_samples < 1 or temperature <= 0 or not 0 < top_p <= 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise UserError(
            f"num_samples={num_samples} and max_new_tokens={max_new_tokens} must be at least 1, "
            f"temperature={temperature} above 0 (greedy=True takes the likeliest token), and top_p={top_p} in (0, 1]"
        )
    codec = policy.codec
    if isinstance(prompts, Rows):
        check_same_tokens(policy.tokenizer, prompts.tokenizer, "policy and prompts")
        examples = [dataclasses.replace(example, responses=[], visit=0) for example in prompts.examples]
    else:
        examples = tokenize(codec, [(text, ()) for text in prompts])[0]
    examples = number_visits(examples)
    new_tokens = max_new_tokens or policy.text.max_response_tokens
    check_lengths(np.asarray([len(example.prompt) + new_tokens for example in examples]), policy)
    sampling = Sampling(new_tokens, num_samples, temperature, top_p, greedy)
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
    check_same_tokens(model.tokenizer, rows.tokenizer, "the model and the rows")
    if not all(example.responses for example in rows.examples):
        raise UserError("these rows have no responses to score: see read_pairs and read_demonstrations")
    longest = [len(example.prompt) + max(map(len, example.responses)) for example in rows.examples]
    check_lengths(np.asarray(longest), model)
    with jax.set_mesh(model.mesh):
        return score_examples(
            model.model, model.params, rows.examples, head=model.head, batch_size=batch_size,
            length_buckets=model.text.length_buckets, mesh=model.mesh,
        )  # fmt: skip


def select(
    pairs: Pairs,
    reward: LoadedModel,
    *,
    threshold: float | None = None,
    easy_fraction: float | None = None,
    relabel: bool = False,
    batch_size: int = 8,
) -> tuple[Pairs, Pairs]:
    """Splits pairs into (easy, hard): easy if the reward gap exceeds the threshold. Section 3.1 of arXiv:2403.19443.

    Args:
      threshold: gap above which a pair is easy; a gap equal to it is hard. With neither this nor `easy_fraction`, 1.0.
      easy_fraction: fraction of the pairs that is easy, instead of a threshold.
      relabel: whether the response with the higher score becomes the chosen one, as for sampled pairs, so gaps are
        never negative. Otherwise labels stay, and a pair that the reward model orders the other way has a negative gap.

    Returns:
      Both parts with `gap` set, in the original order.

    Raises:
      UserError: if `reward` is a language model, both a threshold and a fraction are given, or the fraction does not
        lie in [0, 1].
    """
    reward.check_head("value", "reward")
    if threshold is not None and easy_fraction is not None:
        raise UserError("threshold and easy_fraction are two ways to name one split: give one of them")
    threshold = 1.0 if threshold is None else threshold
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
    easy = np.asarray(selection.split(gap, border))
    return pairs.take(np.flatnonzero(easy)), pairs.take(np.flatnonzero(~easy))
