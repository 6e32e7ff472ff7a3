"""`mpo score`: sums over the response with EOS, or the score at its end, a line for each row in the file's order."""

import json

import numpy as np
import pytest

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.scored import read_scored
from mpo_jax.data.sources import open_source
from mpo_jax.data.text import TextCodec
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.types import Tokens
from tests.cli.conftest import damaged
from tests.models.tiny import mesh_of
from tests.pipeline.test_pipeline import mpo

NO_CACHE = ("runtime.compilation_cache=null", "runtime.token_cache=null")
PROMPTS = ["my boss", "should i quit", "should i quit", " my sister broke the car. my uncle", "x"]
CHOSEN = [" lost the keys", " should i leave, should i stay, should i sue", "", " my boss my boss", " lies about money"]
REJECTED = [" plays loud music, stayed calm", " no", " made a list", " skips the chores", ""]


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_by_one(folder, responses):
    """Each row alone and unpadded: the sum of its response's log-probabilities, or its last token's score."""
    codec = TextCodec(load_tokenizer(folder), TextConfig())
    source = loading.open_model(folder)
    params = loading.weights.load_params(
        source.tensors, source.decoder, mesh_of(1, 1, 1), head=source.head, dtype="float32"
    )
    values = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = [*codec.prompt(prompt).ids, *codec.response(response).ids]
        ones = np.ones((1, len(ids)), np.int32)
        tokens = Tokens(np.asarray([ids]), np.arange(len(ids))[None], ones, 0 * ones, ones > 0)
        if source.head == "value":
            values.append(float(forward.scores(Model(source.decoder), params, tokens)[0, -1]))
            continue
        logits = np.asarray(forward.logits(Model(source.decoder), params, tokens), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start = len(codec.prompt(prompt).ids)
        values.append(sum(logp[t - 1, ids[t]] for t in range(start, len(ids))))
    return values


@pytest.mark.parametrize("name", ["language_model", "reward_model"])
def test_pairs(request, pairs, tmp_path, capsys, name):
    folder, out = request.getfixturevalue(name), tmp_path / "out" / "scores.jsonl"
    assert mpo("score", str(folder), str(pairs), "--out", str(out), "--batch-size", "2", *NO_CACHE) == 0
    field = "score" if name == "reward_model" else "logp"
    rows = lines(out)
    for side, responses in (("chosen", CHOSEN), ("rejected", REJECTED)):
        np.testing.assert_allclose([row[f"{field}_{side}"] for row in rows], one_by_one(folder, responses), rtol=2e-5)
        codec = TextCodec(load_tokenizer(folder), TextConfig())
        assert [row[f"tokens_{side}"] for row in rows] == [len(codec.response(text).ids) for text in responses]
    shown = capsys.readouterr().out
    assert "of 5 rows" in shown and ("NLL per token" in shown) == (field == "logp")


def test_responses_come_back_with_scores_that_a_selection_reads(reward_model, tmp_path, capsys):
    """Lists of different lengths, what else a row has, and old scores, which are replaced."""
    path, out = tmp_path / "sampled.jsonl", tmp_path / "scored.jsonl"
    sampled = [
        {"prompt": p, "responses": [c, r, c][: 2 + n % 2], "id": n, "scores": None}
        for n, (p, c, r) in enumerate(zip(PROMPTS[:2], CHOSEN[:2], REJECTED[:2], strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in sampled))
    assert mpo("score", str(reward_model), str(path), "--out", str(out), *NO_CACHE) == 0
    wanted = list(zip(one_by_one(reward_model, CHOSEN), one_by_one(reward_model, REJECTED), strict=True))
    rows = lines(out)
    assert [{**row, "scores": None, "tokens": 0} for row in rows] == [{**row, "tokens": 0} for row in sampled]
    np.testing.assert_allclose(rows[0]["scores"], wanted[0], rtol=2e-5)
    np.testing.assert_allclose(rows[1]["scores"], [*wanted[1], wanted[1][0]], rtol=2e-5)
    pairs, _ = read_scored(open_source(str(out)), render=Renderer(lambda: pytest.fail("plain rows need no template")))
    assert [pair.scores for pair in pairs] == [(max(row["scores"]), min(row["scores"])) for row in rows]
    path.write_text(json.dumps(sampled[0]) + "\n" + json.dumps({"prompt": "p", "response": "r"}) + "\n")
    assert mpo("score", str(reward_model), str(path), "--out", str(out), *NO_CACHE) == 2
    assert "sampled.jsonl:2: 'responses' must be a list of one response or more" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_classifier_from_elsewhere_reads_a_row_as_one_text(reward_model, foreign_reward_model, pairs, tmp_path):
    """Of plain rows, whose texts tokenize alike in one piece, the same scores; prompts of other chats are set aside."""
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        "".join(
            json.dumps({"prompt": p, "shown": f"{p}!", "response": c}) + "\n"
            for p, c in zip(PROMPTS, CHOSEN, strict=True)
        )
    )
    for model, data, out in (
        (reward_model, pairs, "a"), (foreign_reward_model, pairs, "b"), (foreign_reward_model, samples, "c")
    ):  # fmt: skip
        assert mpo("score", str(model), str(data), "--out", str(tmp_path / out), *NO_CACHE) == 0
    own, text, alone = (lines(tmp_path / name) for name in "abc")
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose([r[f"score_{side}"] for r in text], [r[f"score_{side}"] for r in own], rtol=2e-5)
        whole = [r["tokens_prompt"] + r[f"tokens_{side}"] for r in own]
        assert [r[f"tokens_{side}"] for r in text] == whole and "tokens_prompt" not in text[0]
    np.testing.assert_allclose([r["score"] for r in alone], [r["score_chosen"] for r in text], rtol=2e-5)


@pytest.mark.parametrize("field", ["completion", "response"])
def test_completions_give_the_same_numbers_as_pairs(language_model, pairs, tmp_path, field):
    single = tmp_path / "single.jsonl"
    single.write_text("".join(json.dumps({"prompt": p, field: c}) + "\n" for p, c in zip(PROMPTS, CHOSEN, strict=True)))
    for data, out in ((pairs, "a"), (single, "b")):
        assert mpo("score", str(language_model), str(data), "--out", str(tmp_path / out), *NO_CACHE) == 0
    together, alone = lines(tmp_path / "a"), lines(tmp_path / "b")
    np.testing.assert_allclose([r["logp_chosen"] for r in together], [r["logp"] for r in alone], rtol=2e-5)
    assert alone[0].keys() == {"logp", "tokens", "tokens_prompt"}


def test_dialogues_and_chats(language_model, chat_model, tmp_path):
    """HH-RLHF's two dialogues, and conversations through the template: the same rows as plain text give the same."""
    dialogue, plain, chat, rendered = (tmp_path / f"{n}.jsonl" for n in range(4))
    start = "\n\nHuman: should i quit\n\nAssistant:"
    dialogue.write_text(json.dumps({"chosen": f"{start} should i wait", "rejected": f"{start} left a note"}))
    plain.write_text(json.dumps({"prompt": start, "chosen": " should i wait", "rejected": " left a note"}))
    turns = [{"role": "user", "content": "should i quit"}]
    chat.write_text(
        json.dumps({"prompt": turns, **{k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}})
    )
    whole = "user: should i quit<eos>TL;DR:"
    rendered.write_text(json.dumps({"prompt": whole, "chosen": "chosen", "rejected": "rejected"}))
    for folder, first, second in ((language_model, dialogue, plain), (chat_model, chat, rendered)):
        for data, out in ((first, "a"), (second, "b")):
            assert mpo("score", str(folder), str(data), "--out", str(tmp_path / out), *NO_CACHE) == 0
        if folder == language_model:
            assert lines(tmp_path / "a") == lines(tmp_path / "b")
    # CHAT begins an assistant's turn with a header that its generation prompt does not write: the reply stays as it is
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_dialogues_without_marks_are_split_as_in_training(reward_model, tmp_path, capsys):
    whole, split = tmp_path / "whole.jsonl", tmp_path / "split.jsonl"
    starts = "should i quit\n", "<|im_start|>user\nmy boss<|im_end|>\n<|im_start|>assistant\n"
    whole.write_text("".join(json.dumps({"chosen": f"{s}yes", "rejected": f"{s}no"}) + "\n" for s in starts))
    rows = [{"prompt": s, "chosen": "yes", "rejected": "no"} for s in starts]
    split.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data, out in ((whole, "a"), (split, "b")):
        assert mpo("score", str(reward_model), str(data), "--out", str(tmp_path / out), *NO_CACHE) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    whole.write_text(json.dumps({"chosen": "yes", "rejected": "no"}))
    assert mpo("score", str(reward_model), str(whole), "--out", str(tmp_path / "c"), *NO_CACHE) == 2
    assert "whole.jsonl:1: the row has no field 'prompt', and chosen and rejected share" in capsys.readouterr().err


def test_what_is_cut_is_said(language_model, pairs, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    limits = ("text.max_prompt_tokens=2", "text.max_response_tokens=3", *NO_CACHE)
    assert mpo("score", str(language_model), str(pairs), "--out", str(out), *limits) == 0
    assert max(row["tokens_chosen"] for row in lines(out)) == 3
    shown = capsys.readouterr().out
    assert (
        "cut to fit: 3 prompts (text.max_prompt_tokens=2), responses of 5 rows (text.max_response_tokens=3)"
        in " ".join(shown.split())
    )


def test_rows_that_cannot_be_scored_leave_no_file(language_model, tmp_path, capsys):
    data, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    for text, says in (
        ('{"prompt": "", "chosen": "a", "rejected": "b"}', "1 rows: empty prompt"),
        ('{"prompt": "p", "chosen": "a"}', "rows.jsonl:1"),
        ('{"prompt": "p"}', "rows.jsonl:1"),
        ("", "holds no rows"),
    ):
        data.write_text(text)
        assert mpo("score", str(language_model), str(data), "--out", str(out), *NO_CACHE) == 2
        assert says in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["language_model", "reward_model"])
def test_numbers_that_are_not_finite_leave_no_file(request, pairs, tmp_path, capsys, name):
    folder, out = damaged(request.getfixturevalue(name), tmp_path / "damaged"), tmp_path / "scores.jsonl"
    assert mpo("score", str(folder), str(pairs), "--out", str(out), "--batch-size", "2", *NO_CACHE) == 2
    assert f"{folder}: its outputs are not finite" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_columns_of_other_names_and_end_markers_are_read_as_in_training(language_model, pairs, tmp_path, capsys):
    renamed, out = tmp_path / "renamed.jsonl", tmp_path / "b"
    rows = [{"question": r["prompt"], "chosen": f"{r['chosen']}<|im_end|>", "bad": r["rejected"]} for r in lines(pairs)]
    renamed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--out", out, "data.columns.prompt=question", *NO_CACHE)
    assert mpo("score", language_model, pairs, "--out", tmp_path / "a", *NO_CACHE) == 0
    assert "end with" not in capsys.readouterr().out
    assert mpo("score", language_model, renamed, *given) == 2
    assert "data.columns.rejected=NAME takes it from another column" in capsys.readouterr().err
    assert mpo("score", language_model, renamed, *given, "data.columns.rejected=nein") == 2
    assert "the first rows have no column 'nein'; they have: question, chosen, bad" in capsys.readouterr().err
    assert not out.exists()
    assert mpo("score", language_model, renamed, *given, "data.columns.rejected=bad") == 0
    assert lines(out) == lines(tmp_path / "a")
    said = " ".join(capsys.readouterr().out.split())
    assert "5 responses end with a special token, such as <|im_end|> as text, which is not scored" in said
    assert mpo("score", language_model, renamed, *given, "data.columns.rejected=bad", "text.end_markers=keep") == 0
    kept = zip(lines(out), lines(tmp_path / "a"), strict=True)
    assert all(row["tokens_chosen"] > before["tokens_chosen"] for row, before in kept)
