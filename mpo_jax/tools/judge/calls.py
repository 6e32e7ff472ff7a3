"""The calls of a comparison: every pair in one or both orders, and their outcomes."""

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
      pair: the pair's number.
      swapped: whether A is response 2.
      key: the answer's key in the cache.
    """

    pair: int
    swapped: bool
    prompt: str
    key: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """A judge's whole answer, with the token counts that it reports, if any."""

    text: str
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """The reason why a call has no answer."""

    reason: str


Outcomes = dict[Call, Reply | Failure]

Done = Callable[[Call, Reply | Failure], None]
"""Called with each call's outcome as it arrives, in any order."""


class Judge(Protocol):
    """A model that answers prompts."""

    @property
    def max_tokens(self) -> int | None:
        """The limit of one answer; None if there is none."""
        ...

    def key(self, prompt: str) -> str:
        """The cache key of the answer to a prompt: a hash of all that the answer depends on."""
        ...

    def count_tokens(self, calls: Sequence[Call]) -> tuple[int, str]:
        """Tokens of the calls' prompts, and how they were counted or estimated."""
        ...

    def ask(self, calls: Sequence[Call], done: Done) -> None:
        """Answers the calls.

        Raises:
          UserError: if every further call would fail too.
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
    """The calls to make: those without a cached answer, and only the first of equal ones."""
    found: dict[str, Call] = {}
    for call in calls:
        if cache.get(call.key) is None:
            found.setdefault(call.key, call)
    return list(found.values())


def ask(judge: Judge, calls: Sequence[Call], cache: Cache, progress: Callable[[Reply | Failure], None]) -> Outcomes:
    """The outcome of every call, from the cache if it is there; new answers are cached as they arrive."""
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
    record = cache.get(key)
    assert record is not None, "every call that did not fail has its answer there"
    counts = (record.get(name) for name in ("prompt_tokens", "answer_tokens"))
    return Reply(record["text"], *(count if isinstance(count, int) else None for count in counts))
