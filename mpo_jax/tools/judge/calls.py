"""The calls of a comparison: every pair in one or both orders, and what has been answered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from mpo_jax.evaluation.answers import Pair
from mpo_jax.tools.judge.cache import Cache
from mpo_jax.tools.judge.prompt import fill


@dataclasses.dataclass(frozen=True)
class Call:
    """One question to a judge.

    Attributes:
      pair: its number.
      swapped: whether A is response 2.
      prompt: what is asked.
      key: of the answer in the cache.
    """

    pair: int
    swapped: bool
    prompt: str
    key: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """A judge's whole answer, with the tokens that it says it took, where it does."""

    text: str
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a call has no answer."""

    reason: str


Outcomes = dict[Call, Reply | Failure]

Done = Callable[[Call, Reply | Failure], None]
"""Hears each call's outcome as it comes, in any order."""


class Judge(Protocol):
    """Who answers."""

    @property
    def max_tokens(self) -> int | None:
        """Of one answer at most; None where it is not limited."""
        ...

    def key(self, prompt: str) -> str:
        """Names the answer to this prompt by all that it depends on."""
        ...

    def count_tokens(self, calls: Sequence[Call]) -> tuple[int, str]:
        """Tokens of the calls' prompts, and how they were counted or estimated."""
        ...

    def ask(self, calls: Sequence[Call], done: Done) -> None:
        """Answers the calls.

        Raises:
          UserError: where going on would be of no use.
        """
        ...


def make_calls(judge: Judge, pairs: Sequence[Pair], prompt: str, *, swap: bool) -> list[Call]:
    """A call for each pair with A first, and with `swap` one with B first."""
    calls = []
    for number, pair in enumerate(pairs):
        for swapped in (False, True) if swap else (False,):
            text = fill(prompt, pair, swapped=swapped)
            calls.append(Call(number, swapped, text, judge.key(text)))
    return calls


def missing(calls: Sequence[Call], cache: Cache) -> list[Call]:
    """Those to be made: without a cached answer, and of equal ones the first."""
    found: dict[str, Call] = {}
    for call in calls:
        if cache.get(call.key) is None:
            found.setdefault(call.key, call)
    return list(found.values())


def ask(judge: Judge, calls: Sequence[Call], cache: Cache, progress: Callable[[Reply | Failure], None]) -> Outcomes:
    """What the judge says to every call: from the cache where it is there, where each new answer goes as it comes."""
    failures: dict[str, Failure] = {}

    def done(call: Call, outcome: Reply | Failure) -> None:
        if isinstance(outcome, Reply):
            cache.put(call.key, dataclasses.asdict(outcome))
        else:
            failures[call.key] = outcome
        progress(outcome)

    if wanted := missing(calls, cache):
        judge.ask(wanted, done)
    return {call: failures.get(call.key) or _cached(cache, call.key) for call in calls}


def _cached(cache: Cache, key: str) -> Reply:
    record = cache.get(key) or {}
    return Reply(record["text"], record["prompt_tokens"], record["answer_tokens"])
