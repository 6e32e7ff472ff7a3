"""Live comparison of families with transformers: random configurations, float32, to 1e-4. Needs the extra 'parity'.

    python -m pytest -m parity tests/models/test_parity.py

The last test loads exported folders in a second Python with an older transformers, which MPO_TRANSFORMERS4 names:

    python -m venv OLD && OLD/bin/pip install torch==2.13.0 "transformers==4.57.*"
    MPO_TRANSFORMERS4=OLD/bin/python python -m pytest -m parity tests/models/test_parity.py

Checked so with torch 2.13.0 on CPU, transformers 5.23.0 and 4.57.6.
"""

import copy
import dataclasses
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.data import toy
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families, weights
from mpo_jax.models.hf.tokenizer import save_tokenizer
from mpo_jax.types import Tokens
from tests.models.tiny import batch, load_folder, of_family, random_params

pytestmark = pytest.mark.parity

VOCAB, WIDTH, FAR = 40, 24, 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 of two kinds": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma2 without caps": ("Gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": (
        "Gemma3",
        GEMMA
        | {
            "num_hidden_layers": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            },
        },
    ),
    "gemma3 with a final cap": ("Gemma3", GEMMA | {"final_logit_softcapping": 4.0}),
    "olmo2": ("Olmo2", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox one after the other": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    "yarn": ("Llama", {"head_dim": 12, "rope_parameters": YARN}),
    "yarn with all its options": (
        "Qwen3",
        {
            "head_dim": 12,
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False},
        },
    ),
    "yarn with an attention factor": ("Llama", {"rope_parameters": YARN | {"attention_factor": 0.8}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}}),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[Any, Path]:
    """A random model of transformers in float32, no norm of which is at its initial value, and its folder."""
    torch = pytest.importorskip("torch")
    import transformers

    prefix, options = MODELS[request.param]
    torch.manual_seed(zlib.crc32(request.param.encode()))
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    # a copy, since transformers changes nested options
    model = model_class(model_class.config_class(**copy.deepcopy(COMMON | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def theirs(model: Any, ids: np.ndarray, mask: np.ndarray, position: np.ndarray) -> np.ndarray:
    import torch

    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        out = model(**{key: torch.from_numpy(np.asarray(x, np.int64)) for key, x in inputs.items()}, use_cache=False)
    return out.logits.numpy()


def as_tokens(ids: np.ndarray, mask: np.ndarray, position: np.ndarray) -> Tokens:
    segment = jnp.asarray(mask, jnp.int32)
    return Tokens(
        ids=jnp.asarray(ids, jnp.int32),
        position=jnp.asarray(position, jnp.int32),
        segment=segment,
        branch=jnp.zeros_like(segment),
        loss_mask=segment > 0,
    )


def ours(folder: Path, ids: np.ndarray, mask: np.ndarray, position: np.ndarray) -> np.ndarray:
    config, params = load_folder(folder)
    tokens = as_tokens(ids, mask, position)
    return np.asarray(jax.jit(forward.logits, static_argnums=0)(Model(config), params, tokens))


def padded_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and positions: no padding, padding left, right, and on both sides; all longer than any window."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (4, WIDTH))
    left, length = np.array([[0], [7], [0], [4]]), np.array([[WIDTH], [WIDTH - 7], [WIDTH - 6], [WIDTH - 9]])
    index = np.arange(WIDTH)[None]
    mask = (index >= left) & (index < left + length)
    return np.where(mask, ids, 0), mask, np.where(mask, index - left, 0)


def test_padding_left_and_right(pair):
    model, folder = pair
    ids, mask, position = padded_rows()
    np.testing.assert_allclose(
        ours(folder, ids, mask, position)[mask], theirs(model, ids, mask, position)[mask], rtol=0, atol=1e-4
    )


def test_long_rows(pair):
    """Positions far beyond the window, and beyond the length from which yarn stretches."""
    model, folder = pair
    ids = np.random.default_rng(1).integers(3, VOCAB, (2, FAR))
    mask, position = np.ones_like(ids, bool), np.arange(FAR)[None].repeat(2, 0)
    np.testing.assert_allclose(ours(folder, ids, mask, position), theirs(model, ids, mask, position), rtol=0, atol=1e-4)


def test_prompt_shared_rows(pair):
    """Two responses behind one prompt, of which transformers gets each as a row of its own."""
    model, folder = pair
    config, params = load_folder(folder)
    joined = batch([9, 1, 7], [[6, 4], [3, 6], [6, 1]], width=(9, 6), vocab=VOCAB)
    found = np.asarray(jax.jit(forward.logits, static_argnums=0)(Model(config), params, forward.join(joined)))
    P, S = joined.prompt.shape[1], joined.response.shape[2]
    for b, prompt_len in enumerate(joined.prompt_len):
        for n, size in enumerate(joined.response_len[b]):
            ids = np.concatenate([joined.prompt[b, :prompt_len], joined.response[b, n, :size]])[None]
            wanted = theirs(model, ids, np.ones_like(ids, bool), np.arange(ids.size)[None])[0]
            np.testing.assert_allclose(found[b, :prompt_len], wanted[:prompt_len], rtol=0, atol=1e-4)
            begin = P + n * S
            np.testing.assert_allclose(found[b, begin : begin + size], wanted[prompt_len:], rtol=0, atol=1e-4)


def test_cached_decoding(pair):
    """Our cache, token by token, against transformers' whole rows."""
    model, folder = pair
    config, params = load_folder(folder)
    decoder, joined = Model(config), batch([9, 4], [[12], [12]], width=(9, 12), vocab=VOCAB)
    prompts = dataclasses.replace(joined, response=joined.response[..., :0], response_len=0 * joined.response_len)
    _, cache = jax.jit(forward.prefill, static_argnums=0)(decoder, params, forward.join(prompts))
    recent = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], 12, x.shape[3]), x.dtype), cache)
    decoding, step = forward.for_decoding(decoder, params), jax.jit(forward.decode_step, static_argnums=0)
    lengths, stored = jnp.asarray(joined.prompt_len), jnp.zeros(2, jnp.int32)
    rows = [np.concatenate([p[:n], r[0]])[None] for p, n, r in zip(*dataclasses.astuple(joined)[:3], strict=True)]
    wanted = [theirs(model, ids, np.ones_like(ids, bool), np.arange(ids.size)[None])[0] for ids in rows]
    for t in range(12):
        slot = jnp.asarray(t)
        visible = forward.visible_slots(decoder, lengths, (9, 0, 12), stored, slot)
        hidden, recent = step(decoder, decoding, joined.response[:, 0, t], lengths + t, (cache,), recent, visible, slot)
        logits = forward.logits_from_hidden(decoder, hidden[:, None], decoding["head"], temperature=1.0, allowed_V=None)
        for b, prompt_len in enumerate(joined.prompt_len):
            np.testing.assert_allclose(logits[b, 0], wanted[b][prompt_len + t], rtol=0, atol=1e-4)


def exported(folder: Path, out: Path) -> Path:
    """Our export of a folder."""
    config, params = load_folder(folder)
    families.save_config(out, config, head="lm", eos_id=2, bos_id=1, pad_id=0)
    weights.save_params(out, params, config)
    return out


def test_export_is_the_same_model_in_transformers(pair, tmp_path):
    """To the bit, but for an activation that is written under another of its names, and computed otherwise there."""
    model, folder = pair
    import transformers

    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported(folder, tmp_path), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    rows = padded_rows()
    rounding = 1e-5 if getattr(model.config, "hidden_act", "") == "gelu_fast" else 0.0
    np.testing.assert_allclose(theirs(again.eval(), *rows), theirs(model, *rows), rtol=0, atol=rounding)


ANSWER = """
import sys, numpy, torch, transformers
auto, folder, inputs, out = sys.argv[1:]
# transformers 4 takes torch's attention by default, which leaves out Gemma 2's soft cap
options = {"attn_implementation": "eager", "output_loading_info": True}
model, report = getattr(transformers, auto).from_pretrained(folder, **options)
assert not report["missing_keys"] and not report["unexpected_keys"], report
inputs = {key: torch.from_numpy(x) for key, x in numpy.load(inputs).items()}
with torch.no_grad():
    numpy.save(out, model.eval()(**inputs, use_cache=False).logits.numpy())
"""


def in_transformers_4(auto: str, folder: Path, scratch: Path) -> np.ndarray:
    """What an exported model answers to `padded_rows` there."""
    python = os.environ.get("MPO_TRANSFORMERS4")
    if not python:
        pytest.skip("no MPO_TRANSFORMERS4, a Python with transformers 4.57")
    inputs = dict(zip(("input_ids", "attention_mask", "position_ids"), padded_rows(), strict=True))
    np.savez(scratch / "inputs.npz", **{key: np.asarray(x, np.int64) for key, x in inputs.items()})
    command = [python, "-c", ANSWER, auto, str(folder), "inputs.npz", "out.npy"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=scratch, env=environment, check=True, stdout=sys.stderr)
    return np.load(scratch / "out.npy")


def test_export_is_the_same_model_in_transformers_4(pair, tmp_path):
    model, folder = pair
    found, rows = (
        in_transformers_4("AutoModelForCausalLM", exported(folder, tmp_path / "ours"), tmp_path),
        padded_rows(),
    )
    real = rows[1]
    np.testing.assert_allclose(found[real], theirs(model, *rows)[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != "olmo2"])
def test_exported_reward_model_is_the_same_in_transformers_4(family, tmp_path):
    """At each row's last token. Version 4.57 has no classifier for OLMo 2."""
    config = of_family(family, num_layers=3)
    params, (ids, mask, position) = random_params(config, head="value"), padded_rows()
    families.save_config(tmp_path / "ours", config, head="value", eos_id=2, bos_id=1, pad_id=0)
    weights.save_params(tmp_path / "ours", params, config)
    found = in_transformers_4("AutoModelForSequenceClassification", tmp_path / "ours", tmp_path)[:, 0]
    scores = np.asarray(
        jax.jit(forward.scores, static_argnums=0)(Model(config), params, as_tokens(ids, mask, position))
    )
    last = np.where(mask, np.arange(WIDTH)[None], 0).max(-1)
    np.testing.assert_allclose(found, scores[np.arange(len(last)), last], rtol=0, atol=1e-4)


READ_TOKENS = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(*tokenizer(sys.argv[2])["input_ids"], tokenizer.eos_token, tokenizer.pad_token)
"""


def test_an_exported_tokenizer_is_the_same_in_transformers_4(tmp_path):
    """Version 5 alone knows the class that it writes by itself."""
    python = os.environ.get("MPO_TRANSFORMERS4")
    if not python:
        pytest.skip("no MPO_TRANSFORMERS4, a Python with transformers 4.57")
    tokenizer, text = toy.make_tokenizer(), "should i quit my job"
    save_tokenizer(tokenizer, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    read = subprocess.run(
        [python, "-c", READ_TOKENS, str(tmp_path), text], env=environment, check=True, capture_output=True, text=True
    )
    expected = [*map(str, tokenizer(text)["input_ids"]), str(tokenizer.eos_token), str(tokenizer.pad_token)]
    assert read.stdout.split() == expected
