"""A whole comparison: the calls to make, the judge's answers graded pair by pair, and the files that keep them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.errors import NotFinite, UserError
from mpo_jax.evaluation.answers import Pair
from mpo_jax.runtime.files import write_json, write_lines
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.tools.judge.cache import Cache
from mpo_jax.tools.judge.calls import Call, Failure, Judge, Outcomes, Reply, ask, make_calls, missing
from mpo_jax.tools.judge.local import LocalJudge, reward_totals
from mpo_jax.tools.judge.verdict import Grade, Judged, grade, summary
from mpo_jax.tools.opening import OpenModel, open_model


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Pairs and the calls that grade them.

    Attributes:
      prompt: the judge's, with placeholders for the pair's texts.
      swap: grade in both orders.
    """

    judge: Judge
    pairs: Sequence[Pair]
    prompt: str
    swap: bool
    cache: Cache

    @cached_property
    def calls(self) -> list[Call]:
        return make_calls(self.judge, self.pairs, self.prompt, swap=self.swap)

    @cached_property
    def wanted(self) -> list[Call]:
        """The calls to make: those without a cached answer, and only the first of equal ones."""
        return missing(self.calls, self.cache)

    @cached_property
    def num_cached(self) -> int:
        return sum(self.cache.get(call.key) is not None for call in self.calls)

    def run(self, progress: Callable[[Reply | Failure], None]) -> tuple[list[Judged], dict[str, int]]:
        """Makes the calls; the graded pairs, and the tokens that the judge reports for all of them."""
        outcomes = ask(self.judge, self.calls, self.cache, progress)
        graded = [grade(call, outcomes[call]) for call in self.calls]
        orders = 2 if self.swap else 1
        judged = [Judged(pair, tuple(graded[orders * n : orders * (n + 1)])) for n, pair in enumerate(self.pairs)]
        return judged, _usage(outcomes)


def _usage(outcomes: Outcomes) -> dict[str, int]:
    """Tokens that the judge reports for its answers, cached ones included; 0 where it reports none."""
    replies = [outcome for outcome in outcomes.values() if isinstance(outcome, Reply)]
    return {name: sum(getattr(reply, name) or 0 for reply in replies) for name in ("prompt_tokens", "answer_tokens")}


def open_judge(model: str, overrides: tuple[str, ...], max_tokens: int) -> OpenModel:
    """A language or reward model on this machine, with room for the texts of a comparison.

    Args:
      max_tokens: of an answer.
    """
    try:
        opened = open_model(model, overrides)
    except UserError as error:
        raise UserError(f"--model without --endpoint names a model on this machine. {error}") from error
    check_batch(opened.config.evaluate.batch_size, opened.mesh, "evaluate.batch_size")
    if opened.source.head == "value" or opened.given & {"max_prompt_tokens", "max_response_tokens"}:
        return opened
    # a judge's prompt holds two answers and more, however long its prompts were in training
    room = min(max_tokens, opened.source.decoder.max_positions // 2)
    return opened.with_room_for(room, whole_prompts=True)


def local_judge(opened: OpenModel) -> LocalJudge:
    """An open language model as a judge."""
    return LocalJudge(opened.path, opened.config, opened.codec, opened.mesh, opened.chat)


def judge_by_reward_model(
    opened: OpenModel, pairs: Sequence[Pair], progress: Callable[[int], None]
) -> tuple[list[Judged], dict[str, Any]]:
    """Pairs graded by a reward model's scores, and how many prompts, and pairs by a response, were cut to fit.

    Args:
      progress: called with the number of pairs scored so far.
    """
    totals, tokens, prompts, responses = reward_totals(opened, pairs, progress)
    if not np.isfinite(totals).all():
        # NaN is neither above nor below another score, and would count as a tie
        raise NotFinite(str(opened.path), "its scores")
    cut = {"truncated_prompts": prompts, "truncated_responses": responses}
    lengths = [None] * len(pairs) if tokens is None else [(a, b) for a, b in tokens.tolist()]
    rows = [
        Judged(pair, (Grade(False, (a, b)),), length)
        for pair, (a, b), length in zip(pairs, totals.tolist(), lengths, strict=True)
    ]
    return rows, cut


def write_result(folder: Path, judged: Sequence[Judged], about: Mapping[str, Any], *, resamples: int) -> dict[str, Any]:
    """Writes `judgements.jsonl`, a line a pair, and `result.json`, which is returned.

    Args:
      about: the sides and the judge.
    """
    result = {**about, **summary(judged, resamples=resamples, seed=0)}
    write_lines(folder / "judgements.jsonl", (one.to_dict() for one in judged))
    write_json(folder / "result.json", result)
    return result


def check_failures(judged: Sequence[Judged], result: Mapping[str, Any]) -> None:
    """Raises UserError where calls have failed, with the first one's reason."""
    failures = [grade.text for one in judged for grade in one.grades if grade.status == "failed"]
    if failures:
        raise UserError(
            f"{len(failures)} of {sum(result['calls'].values())} calls failed, and {result['failed']} pairs have no "
            f"verdict for that; the first: {failures[0]}. The same command makes these calls again and no others"
        )
