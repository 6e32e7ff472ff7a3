"""`mpo generate`: what is printed is what the model says, as text or as a chat."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.config.schema import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.batches import Widths, collate
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.types import trainable
from tests.cli.conftest import damaged
from tests.models.tiny import mesh_of, random_params
from tests.pipeline.test_pipeline import mpo

PROMPT = "POST: my boss lost the keys. should i quit?\n\nTL;DR:"
NO_CACHE = "runtime.compilation_cache=null"


def greedy_answer(folder, prompt: str, count: int) -> str:
    """The likeliest continuation by a whole forward pass for every token: no cache, no loop on the device."""
    codec = TextCodec(load_tokenizer(folder), TextConfig())
    source = loading.open_model(folder)
    params = loading.weights.load_params(source.tensors, source.decoder, mesh_of(1, 1, 1), head="lm", dtype="float32")
    allowed = codec.allowed(source.decoder.vocab_size)
    ids = list(codec.prompt(prompt).ids)
    answer: list[int] = []
    logits_of = jax.jit(lambda p, j: forward.logits(Model(source.decoder), p, forward.join(j)))
    while len(answer) < count and codec.eos_id not in answer:
        batch = collate([Example(ids + answer, [])], Widths(80, 1), num_responses=0)
        logits = np.asarray(logits_of(params, batch))[0, len(ids) + len(answer) - 1]
        answer.append(int(np.argmax(np.where(allowed, logits, -np.inf))))
    return codec.decode(answer)


def test_prints_the_likeliest_answer(language_model, capsys):
    assert mpo("generate", str(language_model), PROMPT, NO_CACHE, "--max-new-tokens", "12") == 0
    assert capsys.readouterr().out == greedy_answer(language_model, PROMPT, 12) + "\n"


def test_a_checkpoint_as_it_is_found(decoder, tmp_path, capsys):
    """Tied weights under the head's name, a [PAD] beyond the embedding, and an answer that ends at a listed token."""
    tokenizer = toy.make_tokenizer()
    decoder = dataclasses.replace(decoder, vocab_size=len(tokenizer))
    folder = tmp_path / "model"
    loading.save(folder, Model(decoder), trainable(random_params(decoder)), tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = greedy_answer(folder, PROMPT, 12)
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]"}) == 1
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert mpo("generate", str(folder), PROMPT, NO_CACHE, "--max-new-tokens", "12") == 0
    out = capsys.readouterr().out
    assert out.endswith(said + "\n")
    rows = -(-len(tokenizer) // 8) * 8 - decoder.vocab_size
    assert "lm_head.weight, to which it is tied" in out and f"{rows} rows are added" in out
    # every token ends the answer
    ends = json.dumps({"eos_token_id": list(range(len(tokenizer)))})
    (folder / "generation_config.json").write_text(ends)
    assert mpo("generate", str(folder), PROMPT, NO_CACHE, "--max-new-tokens", "12") == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("each the mean of the others\n\n") and "the answer is empty" in captured.err


def test_a_chat_template_is_used_where_there_is_one(chat_model, capsys, monkeypatch):
    common = ("--max-new-tokens", "8", NO_CACHE)
    assert mpo("generate", str(chat_model), "should i quit", "--system", "my boss", *common) == 0
    chat = capsys.readouterr().out
    assert chat == greedy_answer(chat_model, "system: my boss<eos>user: should i quit<eos>TL;DR:", 8) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("should i quit"))
    assert mpo("generate", str(chat_model), "-", "--raw", *common) == 0
    raw = capsys.readouterr().out
    assert raw == greedy_answer(chat_model, "should i quit", 8) + "\n" != chat


def test_samples_depend_on_the_seed_and_are_told_apart(language_model, capsys):
    def answers(*flags: str) -> list[str]:
        flags = ("--max-new-tokens", "6", "--temperature", "1.5", "--num-samples", "3", *flags)
        assert mpo("generate", str(language_model), PROMPT, NO_CACHE, *flags) == 0
        return capsys.readouterr().out.rstrip("\n").split("\n---\n")

    first = answers()
    assert len(first) == 3 and len(set(first)) > 1
    assert answers() == first != answers("--seed", "1")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max-new-tokens", "96"), "leave no room for a prompt: the model has 96 positions"),
        (("--top-p", "0"), "--top-p must be above 0"),
        (("--system", "x"), "--system needs a tokenizer with a chat template"),
    ],
)
def test_mistakes(language_model, capsys, flags, says):
    assert mpo("generate", str(language_model), PROMPT, NO_CACHE, *flags) == 2
    assert says in capsys.readouterr().err


def test_a_reward_model_writes_no_text(reward_model, tmp_path, capsys):
    assert mpo("generate", str(reward_model), PROMPT, NO_CACHE) == 2
    assert "is a reward model and writes no text: use `mpo score`" in capsys.readouterr().err
    assert mpo("generate", str(tmp_path / "nothing"), PROMPT, NO_CACHE) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_long_prompt_is_cut_and_said_so(language_model, capsys):
    assert mpo("generate", str(language_model), PROMPT + " my boss" * 200, NO_CACHE, "--max-new-tokens", "4") == 0
    assert "the prompt is cut to its last 92 of" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_said(language_model, tmp_path, capsys):
    folder = damaged(language_model, tmp_path / "damaged")
    assert mpo("generate", str(folder), PROMPT, NO_CACHE, "--max-new-tokens", "12") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{folder}: the logits of its next tokens are not finite (NaN or infinity)" in said
    assert "model.compute_dtype=float32" in said
