"""`mpo judge` on files, models and a server on this machine: verdicts, resuming, and what ends it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.text import TextCodec
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.tools.judge import client
from mpo_jax.tools.judge.parse import parse_totals
from tests.cli.conftest import damaged
from tests.cli.test_generate import greedy_answer
from tests.cli.test_score import CHOSEN, NO_CACHE, PROMPTS, REJECTED
from tests.pipeline.test_pipeline import mpo
from tests.tools.judge.server import Act, by_words, scores, serving, words

SECRET = "sk-very-secret-0123456789"
# words of A and of B: two wins, a tie, a loss
ROWS = [("p one", "a b c", "a"), ("p two", "a b", "a"), ("p three", "x y", "a b"), ("p four", "", "a b c d")]
CATEGORIES = ["long", "short", "short", "long"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture
def sides(tmp_path):
    for name, column in (("a", 1), ("b", 2)):
        rows = [{"prompt": r[0], "response": r[column], "kind": c} for r, c in zip(ROWS, CATEGORIES, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


@pytest.fixture
def judge(sides, tmp_path):
    """Runs the command on the two files, or on others."""

    def run(*flags, sides=sides):
        return mpo("judge", *sides, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *flags)

    return run


def result(tmp_path):
    return json.loads((tmp_path / "out" / "result.json").read_text())


def judgements(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]


def remote(server, *flags):
    return ("--endpoint", server.url, "--model", "judge", *flags)


def counts(found):
    return [found["verdict"][name] for name in ("win", "tie", "lose", "without")]


def test_verdicts_in_both_orders_and_from_the_cache(judge, tmp_path, capsys):
    with serving(lambda prompt, before: Act(by_words(prompt))) as server:
        assert judge(*remote(server, "--by", "kind")) == 0
        assert server.calls == 8
        first = result(tmp_path)
        assert judge(*remote(server, "--by", "kind")) == 0
        assert server.calls == 8, "nothing is asked twice"
        assert judge(*remote(server, "--max-tokens", "99", "--no-swap")) == 0
        assert server.calls == 12 and server.bodies[-1]["max_tokens"] == 99, "another question is another answer"
    assert counts(first) == [2, 1, 1, 0] and first["calls"] == {"ok": 8, "unparsed": 0, "failed": 0}
    assert {name: tally["win"] for name, tally in first["by_category"].items()} == {"long": 1, "short": 1}
    assert first["places"]["agree"]["value"] == 1 and first["places"]["first"] == first["places"]["second"] == 3
    assert (first["prompt_tokens"], first["answer_tokens"]) == (800, 160)
    rows = judgements(tmp_path)
    assert [row["outcome"] for row in rows] == ["win", "win", "tie", "lose"]
    assert [(row["total_a"], row["total_b"]) for row in rows] == [(3, 1), (2, 1), (2, 2), (0, 4)]
    shown = capsys.readouterr().out
    assert "8 calls: 0 answered before, 8 to make" in shown and "8 calls: 8 answered before, 0 to make" in shown
    assert "50.0% [15.0%, 85.0%]" in shown and "Both orders agree in 100.0%" in shown


def test_equal_answers_are_judged_once_and_tie(judge, sides, tmp_path, capsys):
    with serving(lambda prompt, before: Act(scores(9, 6))) as server:
        assert judge(*remote(server), sides=(sides[0], sides[0])) == 0
        assert server.calls == 4
    assert "8 calls: 0 answered before, 4 to make, 4 equal to another" in capsys.readouterr().out
    assert counts(result(tmp_path)) == [0, 4, 0, 0]


def test_an_order_s_preference_averages_out(judge, tmp_path, capsys):
    with serving(lambda prompt, before: Act(scores(9, 6))) as server:
        assert judge(*remote(server)) == 0
        found = result(tmp_path)
        assert counts(found) == [0, 4, 0, 0] and found["places"]["first"] == 8
        assert found["places"]["agree"]["value"] == 0
        assert judge(*remote(server, "--no-swap")) == 0
    assert counts(result(tmp_path)) == [4, 0, 0, 0] and "places" not in result(tmp_path)


def test_dry_run_asks_nothing_and_counts_what_is_left(judge, tmp_path, monkeypatch, capsys):
    with serving(lambda prompt, before: Act(by_words(prompt))) as server:
        monkeypatch.delenv("OPENAI_API_KEY")
        assert judge(*remote(server, "--dry-run")) == 0
        assert server.calls == 0 and not (tmp_path / "out").exists()
        shown = " ".join(capsys.readouterr().out.split())
        assert "4 pairs, 8 calls: 0 answered before, 8 to make" in shown
        assert "at most 4,096 answer tokens" in shown and "a token for every 4 bytes of UTF-8" in shown
        assert judge(*remote(server, "--no-swap")) == 0
        sent = sum(-(-len(body["messages"][0]["content"].encode()) // 4) for body in server.bodies)
        capsys.readouterr()
        assert judge(*remote(server, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "8 calls: 4 answered before, 4 to make" in shown and f"{sent:,} prompt tokens" in shown


def test_what_cannot_be_read_is_no_tie(judge, tmp_path, capsys):
    with serving(lambda prompt, before: Act("Both are fine." if "p two" in prompt else by_words(prompt))) as server:
        assert judge(*remote(server)) == 0
        found = result(tmp_path)
        assert counts(found) == [1, 1, 1, 1] and found["unparsed"] == 1 and found["calls"]["unparsed"] == 2
        assert judgements(tmp_path)[1]["outcome"] is None and judgements(tmp_path)[1]["status"] == "unparsed"
    assert "Without a verdict: 1 pairs with an answer that could not be read" in capsys.readouterr().out


def test_failed_calls_end_with_a_message_and_are_made_again(judge, tmp_path, capsys):
    broken = Act(status=500, body=b'{"error": {"message": "no memory"}}')
    with serving(lambda prompt, before: broken if "p two" in prompt else Act(by_words(prompt))) as server:
        assert judge(*remote(server, "--tries", "2")) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "2 of 8 calls failed, and 1 pairs have no verdict" in said and "no memory" in said
        found = result(tmp_path)
        assert counts(found) == [1, 1, 1, 1] and (found["failed"], found["unparsed"]) == (1, 0)
        before = server.calls
        server.behave = lambda prompt, before: Act(by_words(prompt))
        assert judge(*remote(server)) == 0
        assert server.calls == before + 2
    assert counts(result(tmp_path)) == [2, 1, 1, 0]


def test_the_key_is_written_nowhere(judge, tmp_path, capsys):
    def repeat(prompt, before):
        if "p one" in prompt:
            return Act(status=400, body=json.dumps({"error": {"message": f"bad: {SECRET}"}}).encode())
        return Act(f"{by_words(prompt)} {SECRET}")

    with serving(repeat) as server:
        assert judge(*remote(server)) == 2
    out, err = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"answers.jsonl", "result.json", "judgements.jsonl"} <= {path.name for path in files}
    for text in (out, err, *(path.read_text() for path in files)):
        assert SECRET not in text
    assert "bad: ***" in err


def test_another_prompt_and_further_fields(judge, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("{instruction}/{response_1}/{response_2}")
    with serving(lambda prompt, before: Act(scores(len(prompt.split("/")[1]), len(prompt.split("/")[2])))) as server:
        fields = '{"max_tokens": null, "max_completion_tokens": 7, "seed": 3}'
        assert judge(*remote(server, "--prompt-file", path, "--request", fields)) == 0
        assert "p one/a b c/a" in [body["messages"][0]["content"] for body in server.bodies]
        body = server.bodies[0]
        assert (body["max_completion_tokens"], body["seed"], body["temperature"]) == (7, 3, 0.0)
        assert "max_tokens" not in body
    assert counts(result(tmp_path)) == [2, 1, 1, 0] and result(tmp_path)["prompt_file"] == str(path)


def test_the_prompts_to_compare_on_may_have_another_column(judge, tmp_path):
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"question": row[0]}) + "\n" for row in ROWS[:2]))
    with serving(lambda prompt, before: Act(by_words(prompt))) as server:
        asked = ("--data", tmp_path / "asked.jsonl", "data.columns.prompt=question")
        assert judge(*remote(server), *asked) == 0 and server.calls == 4


@pytest.mark.thorough
def test_a_run_that_is_interrupted_goes_on(sides, tmp_path):
    """Some answers come and the others never: Ctrl-C ends the process, and the next one asks for the others alone."""
    # a shell that started the tests in the background has made them deaf to the signal
    script = "import signal; signal.signal(2, signal.default_int_handler); from mpo_jax.cli import main; main()"
    command = [sys.executable, "-c", script, "judge", *sides]
    command += ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    with serving(lambda prompt, before: Act(by_words(prompt), wait=60 if words(prompt)[0] > 1 else 0)) as server:
        flags = remote(server, "--concurrency", "8")
        answers = tmp_path / "cache" / "answers.jsonl"
        quick = sum(min(len(first.split()), 10) < 2 for r in ROWS for first in r[1:])
        process = subprocess.Popen([*map(str, command), *flags], stderr=subprocess.PIPE, text=True)
        begin = time.monotonic()
        while time.monotonic() - begin < 60 and process.poll() is None:
            if answers.exists() and answers.read_text().count("\n") == quick and server.calls == 8:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and "Traceback" not in err
        kept = f"the answers so far are kept in {tmp_path}/cache/answers.jsonl"
        assert err.endswith(f"interrupted: {kept}; the same command goes on from there\n")
        # as a kill in the middle of a write leaves it
        with answers.open("a") as file:
            file.write('{"key": "half')
        server.behave = lambda prompt, before: Act(by_words(prompt))
        assert mpo("judge", *sides, "--out", tmp_path / "out", "--cache", tmp_path / "cache", *flags) == 0
        assert server.calls == 16 - quick
    assert counts(result(tmp_path)) == [2, 1, 1, 0]


@pytest.mark.thorough
def test_sides_that_a_model_answers(judge, language_model, tmp_path, capsys):
    """The model's likeliest answers, kept, against a file that answers more prompts."""
    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    prompts = ["POST: my boss lost the keys.\n\nTL;DR:", "should i quit"]
    data.write_text("".join(json.dumps({"prompt": p, "category": p[0]}) + "\n" for p in prompts))
    other.write_text("".join(json.dumps({"prompt": p, "response": "x"}) + "\n" for p in ["more", *prompts]))
    greedy = ("evaluate.greedy=true", "text.max_response_tokens=6", "text.max_prompt_tokens=40", *NO_CACHE)
    with serving(lambda prompt, before: Act(by_words(prompt))) as server:
        assert judge(*remote(server, "--data", data), *greedy, sides=(str(language_model), str(other))) == 0
    rows = judgements(tmp_path)
    assert [row["a"] for row in rows] == [greedy_answer(language_model, prompt, 6) for prompt in prompts]
    assert [row["b"] for row in rows] == ["x", "x"] and result(tmp_path)["by_category"].keys() == {"P", "s"}
    kept = [json.loads(line) for line in (tmp_path / "out" / "answers-a.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["response"]) for row in kept] == [(row["prompt"], row["a"]) for row in rows]


@pytest.mark.parametrize("name", ["reward_model", "foreign_reward_model"])
def test_a_reward_model_as_judge(judge, sides, request, name, tmp_path, capsys):
    reward_model = request.getfixturevalue(name)
    rows = list(zip(PROMPTS, CHOSEN, REJECTED, strict=True))
    for path, column in zip(sides, (1, 2), strict=True):
        Path(path).write_text("".join(json.dumps({"prompt": r[0], "response": r[column]}) + "\n" for r in rows))
    assert judge("--model", reward_model, "--dry-run", *NO_CACHE) == 0
    assert "no calls" in capsys.readouterr().out
    assert judge("--model", reward_model, *NO_CACHE) == 0
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": p, "chosen": a, "rejected": b}) + "\n" for p, a, b in rows))
    assert mpo("score", reward_model, pairs, "--out", out, "--batch-size", "64", *NO_CACHE) == 0
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    found = judgements(tmp_path)
    assert [(r["total_a"], r["total_b"]) for r in found] == [(s["score_chosen"], s["score_rejected"]) for s in scores]
    won = [s["score_chosen"] > s["score_rejected"] for s in scores]
    assert [row["outcome"] for row in found] == ["win" if w else "lose" for w in won] and len(set(won)) == 2


def test_two_fields_of_one_file_as_sides(judge, reward_model, tmp_path, capsys):
    """How often a judge agrees with labels: chosen against rejected responses."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": p, "chosen": a, "rejected": [{"role": "assistant", "content": b}], "response": "neither"}
        for p, a, b in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", reward_model, "--out", tmp_path / "out", *NO_CACHE)
    assert mpo("judge", f"{pairs}:chosen", f"{pairs}:rejected", *flags) == 0
    assert [(row["a"], row["b"]) for row in judgements(tmp_path)] == list(zip(CHOSEN, REJECTED, strict=True))
    assert result(tmp_path)["a"] == f"{pairs}:chosen"
    # a column that data.columns names for the prompt counts for both sides
    pairs.write_text("".join(json.dumps({"question" if k == "prompt" else k: v for k, v in row.items()}) + "\n"
                             for row in rows))  # fmt: skip
    assert mpo("judge", f"{pairs}:chosen", f"{pairs}:rejected", "data.columns.prompt=question", *flags) == 0
    # a field's name may hold colons
    pairs.write_text("".join(json.dumps({**row, "a:b": row["chosen"]}) + "\n" for row in rows))
    assert mpo("judge", f"{pairs}:a:b", f"{pairs}:rejected", *flags) == 0
    assert [row["a"] for row in judgements(tmp_path)] == CHOSEN
    pairs.write_text("".join(json.dumps({"question" if k == "prompt" else k: v for k, v in row.items()}) + "\n"
                             for row in rows))  # fmt: skip
    capsys.readouterr()
    assert mpo("judge", f"{pairs}:better", f"{pairs}:rejected", "data.columns.prompt=question", *flags) == 2
    assert "no field 'better'" in (said := capsys.readouterr().err) and "pairs.jsonl:1" in said and "chosen" in said


def test_a_language_model_as_judge(judge, language_model, tmp_path, capsys):
    """Its likeliest answer to the same prompt, from the cache the second time; a prompt without room is told."""
    path = tmp_path / "prompt.txt"
    path.write_text("my {instruction} {response_1} or {response_2}")
    flags = ("--model", language_model, "--prompt-file", path, "--max-tokens", "6", *NO_CACHE)
    assert judge(*flags, "--dry-run") == 0
    shown = capsys.readouterr().out
    codec = TextCodec(load_tokenizer(language_model), TextConfig())
    asked = [f"my {p} {x} or {y}" for p, a, b in ROWS for x, y in ((a, b), (b, a))]
    assert f"{sum(codec.prompt(text).full for text in asked):,} prompt tokens (counted by" in shown
    assert "at most 48 answer tokens" in shown
    assert judge(*flags) == 0
    texts = [grade["text"] for row in judgements(tmp_path) for grade in row["grades"]]
    assert texts == [greedy_answer(language_model, text, 6) for text in asked]
    assert all(parse_totals(text) is None for text in texts) and result(tmp_path)["unparsed"] == 4
    capsys.readouterr()
    assert judge(*flags) == 0
    assert "8 calls: 8 answered before, 0 to make" in capsys.readouterr().out
    path.write_text("my boss " * 60 + "{instruction} {response_1} {response_2}")
    assert judge(*flags) == 2
    assert "8 of 8 calls failed" in (said := capsys.readouterr().err) and "room for 90" in said


def test_mistakes(judge, sides, language_model, reward_model, tmp_path, capsys):
    (tmp_path / "short.jsonl").write_text('{"prompt": "p one", "response": "r"}')
    (tmp_path / "prompt.txt").write_text("{instruction}")
    short = (sides[0], str(tmp_path / "short.jsonl"))
    at = ("--endpoint", "http://127.0.0.1:1/v1", "--model", "m")
    for flags, of, says in (
        (at, short, "short.jsonl has no answer to 3 of the 4 prompts"),
        (at, (sides[0], str(language_model)), "--data FILE"),
        ((*at, "--data", sides[0], *NO_CACHE), (sides[0], str(reward_model)), "is a reward model and writes no text"),
        # before the other side's model samples
        (
            (*at, "--data", sides[0], *NO_CACHE),
            (str(language_model), str(reward_model)),
            "is a reward model and writes no text",
        ),
        ((*at, "--prompt-file", str(tmp_path / "prompt.txt")), sides, "lacks {response_1}, {response_2}"),
        ((*at, "--request", "[1]"), sides, "--request wants a JSON object"),
        ((*at, "--request", "{"), sides, "--request is no JSON"),
        ((*at, "--request", '{"top_p": NaN}'), sides, "--request is no JSON"),
        ((*at, "--request", '{"stop": "\\ud800"}'), sides, "--request is no JSON"),
        ((*at, "--request", '{"max_tokens": "x"}'), sides, "--request: max_tokens='x' must be a positive integer"),
        ((*at, "--request", '{"max_tokens": true}'), sides, "--request: max_tokens=True must be a positive integer"),
        (
            (*at, "--request", '{"max_tokens": null, "max_completion_tokens": [1]}'),
            sides,
            "--request: max_completion_tokens=[1] must be a positive integer",
        ),
        (("--endpoint", "localhost:8000", "--model", "m"), sides, "--endpoint wants a URL"),
        (("--endpoint", "https://u:hidden@host/v1", "--model", "m"), sides, "must hold no password"),
        (("--endpoint", "https://host/v1?key=hidden", "--model", "m"), sides, "must hold no password"),
        (("--endpoint", "https://host/v1#hidden", "--model", "m"), sides, "must hold no password"),
        (("--model", str(tmp_path / "none")), sides, "--model without --endpoint names a model on this machine"),
    ):
        assert judge(*flags, sides=of) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert says in said and "hidden" not in said, said
    assert not (tmp_path / "out").exists()


def test_the_sides_may_be_runs(judge, tmp_path):
    runs = []
    for name, column in (("a", 1), ("b", 2)):
        folder = tmp_path / "runs" / name
        (folder / "evaluate").mkdir(parents=True)
        (folder / "env.json").write_text("{}")
        rows = [{"prompt": r[0], "response": r[column], "score": 0.5, "kl": 0.1} for r in ROWS]
        (folder / "evaluate" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(str(folder))
    with serving(lambda prompt, before: Act(by_words(prompt))) as server:
        assert judge(*remote(server), sides=runs) == 0
    assert counts(result(tmp_path)) == [2, 1, 1, 0] and result(tmp_path)["a"] == runs[0]


@pytest.mark.parametrize("name", ["language_model", "reward_model"])
def test_a_judge_whose_numbers_are_not_finite_gives_no_verdict(judge, request, tmp_path, capsys, name):
    folder = damaged(request.getfixturevalue(name), tmp_path / "damaged")
    path = tmp_path / "prompt.txt"
    path.write_text("my {instruction} {response_1} or {response_2}")
    assert judge("--model", folder, "--prompt-file", path, "--max-tokens", "6", *NO_CACHE) == 2
    assert f"{folder}: " in (said := " ".join(capsys.readouterr().err.split())) and "are not finite" in said
    assert not (tmp_path / "out").exists()
