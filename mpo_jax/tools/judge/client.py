"""Concurrent calls of an OpenAI-compatible endpoint, retried after transient errors."""

import asyncio
import email.utils
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import tenacity

from mpo_jax.credentials import hide
from mpo_jax.errors import UserError
from mpo_jax.tools.judge.calls import Call, Done, Failure, Reply
from mpo_jax.tools.judge.endpoint import KEY, Endpoint

BACKOFF_S = 1.0
"""The first retry waits a random time up to this long; the limit doubles with each further retry."""

LONGEST_BACKOFF_S = 60.0
LONGEST_WAIT_S = 300.0
"""The longest Retry-After that is waited for; a daily quota asks for hours, and ends the command instead."""

STOP_AFTER = 5
"""The number of consecutive calls that may fail, each after all of its tries."""

LONGEST_REASON = 300


class Malformed(Exception):
    """A response of status 200 without an answer in it."""


def ask(endpoint: Endpoint, secret: str | None, calls: Sequence[Call], done: Done) -> None:
    """Makes the calls, and passes each outcome to `done` as it arrives.

    Raises:
      UserError: if every further call would fail too.
    """
    try:
        asyncio.run(_Client(endpoint, secret, done).ask(iter(calls)))
    except ExceptionGroup as group:
        # if several workers failed at once, one error is enough
        raise group.exceptions[0] from None


class _Client:
    def __init__(self, endpoint: Endpoint, secret: str | None, done: Done):
        self._endpoint, self._secret, self._done = endpoint, secret, done
        self._paused_until = 0.0
        self._failed_in_row = 0

    async def ask(self, calls: Iterator[Call]) -> None:
        # retries are made here, so that Retry-After holds back all calls and malformed answers are retried too
        async with openai.AsyncOpenAI(
            base_url=self._endpoint.url, api_key=self._secret or "none", max_retries=0
        ) as client:

            async def work() -> None:
                for call in calls:
                    self._done(call, await self._one(client, call))

            async with asyncio.TaskGroup() as group:
                for _ in range(self._endpoint.concurrency):
                    group.create_task(work())

    async def _one(self, client: openai.AsyncOpenAI, call: Call) -> Reply | Failure:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._endpoint.tries),
            wait=self._wait,
            retry=tenacity.retry_if_exception(_is_transient),
            reraise=True,
        )
        try:
            reply = await retrying(self._attempt, client, call.prompt)
        except (openai.OpenAIError, TimeoutError, ValueError, Malformed) as error:
            reason = self._reason(error)
            if advice := _advice(error):
                raise UserError(f"{self._endpoint.url}: {reason}. {advice}") from None
            self._failed_in_row += 1
            if self._failed_in_row >= STOP_AFTER:
                raise UserError(
                    f"{self._endpoint.url}: {STOP_AFTER} calls in a row failed, the last with: {reason}. The "
                    "answers so far are kept: fix the cause, and run the same command again"
                ) from None
            return Failure(reason)
        self._failed_in_row = 0
        return reply

    async def _attempt(self, client: openai.AsyncOpenAI, prompt: str) -> Reply:
        while (pause := self._paused_until - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        # the client's own timeout is per read, so a slow stream might never end
        async with asyncio.timeout(self._endpoint.timeout_s):
            try:
                completion = await client.chat.completions.create(
                    model=self._endpoint.model,
                    messages=[{"role": "user", "content": prompt}],
                    extra_body=self._endpoint.fields,
                    timeout=self._endpoint.timeout_s,
                )
            except RecursionError:  # of the client's JSON parser, whose depth nobody limits
                raise Malformed("an answer of JSON that is nested too deeply") from None
        reply = _reply(completion)
        # a server that echoes the request's headers must not put the key into the cache
        return Reply(self._without_secret(reply.text), reply.prompt_tokens, reply.answer_tokens)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        requested = _retry_after(state.outcome.exception() if state.outcome else None)
        if requested is None:
            return tenacity.wait_random_exponential(multiplier=BACKOFF_S, max=LONGEST_BACKOFF_S)(state)
        self._paused_until = max(self._paused_until, time.monotonic() + requested)
        return requested

    def _reason(self, error: Exception) -> str:
        """The error in one line, without the key."""
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            text = f"no whole answer within {self._endpoint.timeout_s:g} s"
        elif isinstance(error, openai.APIConnectionError):
            text = f"connection failed or was lost ({error.__cause__ or 'no reason given'})"
        elif isinstance(error, ValueError):
            text = f"an answer that is no JSON ({error})"
        else:
            text = str(error) or type(error).__name__
        return self._without_secret(hide(" ".join(text.split())))[:LONGEST_REASON]

    def _without_secret(self, text: str) -> str:
        return text if self._secret is None else text.replace(self._secret, "***")


def _reply(completion: Any) -> Reply:
    """The answer in a completion, whose shape the client does not check.

    Raises:
      Malformed: if there is no text, and no reason for that.
    """
    try:
        choice = completion.choices[0]
        text, why = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        raise Malformed("an answer without choices[0].message.content") from None
    if text is None and why in ("length", "content_filter"):
        text = ""  # all tokens went into thinking, or the judge refused: an answer without scores
    if not isinstance(text, str):
        raise Malformed("an answer whose message has no text")
    usage = getattr(completion, "usage", None)
    prompt, answer = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(text, prompt if isinstance(prompt, int) else None, answer if isinstance(answer, int) else None)


def _is_transient(error: BaseException) -> bool:
    """Whether another try may succeed."""
    if isinstance(error, openai.APIStatusError):
        passes = error.status_code >= 500 or error.status_code in (408, 409, 429)
        return passes and error.code != "insufficient_quota" and (_retry_after(error) or 0.0) <= LONGEST_WAIT_S
    passing = openai.APIConnectionError, openai.APIResponseValidationError, TimeoutError, ValueError, Malformed
    return isinstance(error, passing)


def _advice(error: Exception) -> str | None:
    """What to do about an error that every other call would have too; None if it may be this call's own."""
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return f"Set the environment variable {KEY} to a key of this endpoint"
    if isinstance(error, openai.NotFoundError):
        return "Check --endpoint (the part before /chat/completions) and --model"
    if isinstance(error, openai.RateLimitError) and not _is_transient(error):
        return "The answers so far are kept: run the same command again once the limit is lifted"
    return None


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds to wait by the server's Retry-After, a number or a date; never negative."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        seconds = math.nan if date is None else email.utils.mktime_tz(date) - time.time()
    return None if math.isnan(seconds) else max(seconds, 0.0)
