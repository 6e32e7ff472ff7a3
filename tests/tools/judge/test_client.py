"""Calls of a server that limits, fails, hangs, breaks off, drips and talks nonsense end in an answer or a reason."""

import json
import time

import pytest

pytest.importorskip("openai", reason="the client of the judge: bash launch/setup.sh judge")

from mpo_jax.errors import UserError
from mpo_jax.tools.judge import client
from mpo_jax.tools.judge.calls import Call, Failure, Reply
from mpo_jax.tools.judge.endpoint import Endpoint
from mpo_jax.tools.judge.remote import RemoteJudge
from tests.tools.judge.server import Act, completion, scores, serving

SECRET = "sk-very-secret-0123456789"
GOOD = Act(scores(8, 7))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def ask(url, prompts, *, done=None, concurrency=4, tries=4, timeout_s=5.0, fields=None):
    limits = {"concurrency": concurrency, "tries": tries, "timeout_s": timeout_s}
    judge = RemoteJudge(Endpoint.of(url, "judge", fields or {}, **limits))
    found = {}
    calls = [Call(n, False, prompt, judge.key(prompt)) for n, prompt in enumerate(prompts)]
    judge.ask(calls, done or (lambda call, outcome: found.__setitem__(call.prompt, outcome)))
    return found


def first(act, times=1):
    """Does `act` so often, then answers."""
    return lambda prompt, before: act if before < times else GOOD


def test_an_answer_with_its_tokens_and_what_was_sent():
    with serving(lambda prompt, before: GOOD) as server:
        found = ask(server.url, ["p"], fields={"temperature": 0.5, "max_tokens": 7, "top_p": None})
    assert found == {"p": Reply(scores(8, 7), 100, 20)}
    assert server.bodies == [
        {"model": "judge", "messages": [{"role": "user", "content": "p"}], "temperature": 0.5, "max_tokens": 7}
    ]
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    "act",
    [
        Act(status=500, body=b'{"error": {"message": "oops"}}'),
        Act(status=503, body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
        Act(status=429, body=b'{"error": {"message": "slow down"}}'),
        Act(status=408, body=b""),
        Act(body=scores(1, 1), cut=40),
        Act(body=scores(1, 1), cut=0),
        Act(body=completion("text")[:-20]),
        Act(body=b"", headers={"Content-Type": "application/json"}),
        Act(body=b"not json at all"),
        Act(body=b"[]"),
        Act(body=b"null"),
        Act(body=b'{"choices": []}'),
        Act(body=b'{"choices": null, "error": "overloaded"}'),
        Act(body=b'{"choices": [{"message": null, "finish_reason": "stop"}]}'),
        Act(body=completion(None)),
        Act(body=b'{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}'),
        Act(body=b"\xff\xfe\x00"),
        Act(body=b"[" * 100_000),
        Act(body=completion("text")[:-1] + b', "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        Act(body=b"<html>a proxy</html>", headers={"Content-Type": "text/html"}),
    ],
    ids=lambda act: f"{act.status}-{act.body[:12]!r}-{act.cut}",
)
def test_what_passes_is_tried_again(act):
    with serving(first(act, 2)) as server:
        assert ask(server.url, ["p"]) == {"p": Reply(scores(8, 7), 100, 20)}
    assert server.calls == 3


@pytest.mark.parametrize("act", [Act("late", wait=30), Act("slow", drip=0.02)], ids=["hangs", "drips"])
def test_a_try_ends_with_its_time(act):
    """A stream of single bytes keeps a connection's own time-out from ever coming."""
    begin = time.monotonic()
    with serving(first(act)) as server:
        assert ask(server.url, ["p"], timeout_s=0.3) == {"p": Reply(scores(8, 7), 100, 20)}
    assert server.calls == 2 and time.monotonic() - begin < 3


def test_a_slow_stream_within_its_time_is_an_answer():
    with serving(lambda prompt, before: Act("slow", drip=0.001)) as server:
        assert ask(server.url, ["p"])["p"].text == "slow"
    assert server.calls == 1


def test_without_text_but_with_a_reason_is_an_answer():
    for why in ("length", "content_filter"):
        with serving(lambda prompt, before, why=why: Act(body=completion(None, why))) as server:
            assert ask(server.url, ["p"]) == {"p": Reply("", 100, 20)}
        assert server.calls == 1


def test_retry_after_is_waited_for_by_all():
    limited = Act(status=429, headers={"Retry-After": "0.6"}, body=b"{}")
    with serving(lambda prompt, before: limited if (prompt, before) == ("0", 0) else GOOD) as server:
        found = ask(server.url, list("012345"), concurrency=1)
    assert len(found) == 6 and server.calls == 7
    assert server.times[1] - server.times[0] >= 0.59
    with serving(lambda prompt, before: limited if before == 0 else Act("x", wait=0.05)) as server:
        found = ask(server.url, list("012345"), concurrency=3)
    early = [t for t in server.times if t < server.times[0] + 0.59]
    assert len(found) == 6 and len(early) == 3


def test_a_date_to_retry_after():
    """The clock decides, not the time since the first call: on a busy machine that call may come late."""
    second = int(time.time()) + 3
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
    ahead = time.time() - time.monotonic()
    with serving(first(Act(status=503, headers={"Retry-After": date}, body=b"{}"))) as server:
        ask(server.url, ["p"])
    assert server.calls == 2 and server.times[1] + ahead >= second - 0.01


def test_no_more_at_once_than_asked():
    with serving(lambda prompt, before: Act("x", wait=0.05)) as server:
        ask(server.url, [str(n) for n in range(12)], concurrency=3)
    assert server.most == 3 and server.calls == 12


def test_a_call_that_never_succeeds_has_a_reason_and_the_others_go_on():
    broken = Act(status=500, body=b'{"error": {"message": "cannot do this one"}}')
    with serving(lambda prompt, before: broken if prompt == "1" else GOOD) as server:
        found = ask(server.url, list("0123"), tries=3, concurrency=1)
    assert isinstance(found["1"], Failure) and "cannot do this one" in found["1"].reason
    assert [isinstance(found[p], Reply) for p in "023"] == [True] * 3 and server.calls == 6


def test_a_request_that_the_server_refuses_is_not_repeated():
    with serving(lambda prompt, before: Act(status=400, body=b'{"error": {"message": "too long"}}')) as server:
        found = ask(server.url, ["p"])
    assert "too long" in found["p"].reason and server.calls == 1


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (Act(status=401, body=b'{"error": {"message": "bad key"}}'), "Set the environment variable OPENAI_API_KEY"),
        (Act(status=403, body=b"{}"), "Set the environment variable OPENAI_API_KEY"),
        (Act(status=404, body=b'{"error": {"message": "no model judge"}}'), "Check --endpoint"),
        (
            Act(status=429, body=b'{"error": {"message": "pay", "code": "insufficient_quota"}}'),
            "run the same command again once the limit",
        ),
        (Act(status=429, body=b"{}", headers={"Retry-After": "86400"}), "run the same command again once the limit"),
    ],
    ids=["401", "403", "404", "quota", "tomorrow"],
)
def test_what_every_call_would_meet_stops_at_once(act, says):
    with serving(lambda prompt, before: act) as server, pytest.raises(UserError, match=says):
        ask(server.url, [str(n) for n in range(50)], concurrency=2)
    assert server.calls <= 2


def test_a_server_that_is_not_there_stops_after_some_calls():
    with serving(lambda prompt, before: GOOD) as server:
        url = server.url
    heard = []
    with pytest.raises(UserError, match="5 calls in a row failed, the last with: connection failed"):
        ask(url, [str(n) for n in range(50)], tries=2, concurrency=1, done=lambda call, outcome: heard.append(call))
    assert len(heard) == 4


def test_answers_before_a_stop_have_been_told():
    heard = []

    def behave(prompt, before):
        return GOOD if int(prompt) < 3 else Act(status=401, body=b"{}")

    with serving(behave) as server, pytest.raises(UserError):
        ask(server.url, list("012345"), concurrency=1, done=lambda call, outcome: heard.append(call.prompt))
    assert heard == ["0", "1", "2"]


@pytest.mark.parametrize("status", [200, 400, 401])
def test_the_key_is_in_nothing_that_comes_back(status):
    """A server that repeats the request's headers, in an error or in an answer."""
    said = f"you sent Bearer {SECRET}"
    body = completion(said) if status == 200 else json.dumps({"error": {"message": said}}).encode()
    with serving(lambda prompt, before: Act(status=status, body=body)) as server:
        try:
            text = str(ask(server.url, ["p"]))
        except UserError as error:
            text = str(error)
    assert "you sent Bearer ***" in text and SECRET not in text


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_fits_no_header_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a character") as caught:
        ask("http://127.0.0.1:1/v1", ["p"])
    assert key not in str(caught.value)


def test_servers_of_one_s_own_need_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(lambda prompt, before: GOOD) as server:
        assert len(ask(server.url, ["p"])) == 1
    assert SECRET not in str(server.headers)
