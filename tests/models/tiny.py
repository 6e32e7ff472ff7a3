"""Tiny models and batches for the tests of the model and of generation, drawn here or recorded from transformers."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from mpo_jax.config.schema import MeshConfig
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families, weights
from mpo_jax.models.hf.families import FAMILIES
from mpo_jax.models.hf.safetensors_folder import SafetensorsFolder
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.types import Head, PromptBatch, Tokens, Tree

RECORDED = Path(__file__).resolve().parents[1] / "fixtures" / "models"
"""Folders that tests/fixtures/make_model_fixtures.py made, each named as in it."""
LANGUAGE_MODELS = (
    "untied", "tied", "llama3", "linear", "mistral", "qwen2", "qwen3", "yarn", "gemma2", "gemma3", "olmo2", "gpt_neox",
)  # fmt: skip
REWARD_MODELS = ("llama_score", "qwen2_score", "gemma2_score", "gpt_neox_score")

# grouped queries, heads narrower than hidden_size / num_heads would be; every size divides over 2, 4 and 8 devices
DECODER = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    max_positions=64,
)

# whole passes as programs: run as they stand, each of their operations is compiled by itself
join = jax.jit(forward.join)
logits = jax.jit(forward.logits, static_argnums=0)
scores = jax.jit(forward.scores, static_argnums=0)
response_logps = jax.jit(forward.response_logps, static_argnums=0)

FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options that halve the time to compile; how a program is divided over devices is settled before."""


def with_layers(config: DecoderConfig, *specs: LayerSpec, **sizes: Any) -> DecoderConfig:
    """The same sizes, or others where given, with layers of this pattern."""
    return dataclasses.replace(config, pattern=specs, **sizes)


def of_family(family: str, **sizes: Any) -> DecoderConfig:
    """The same sizes, or others where given, of a model of this family with plain layers."""
    has = FAMILIES[family]
    own: dict[str, Any] = {"family": family, "norm": has.norm, "scale_embedding": has.scale_embedding}
    if has.plain_heads:
        own |= {"num_kv_heads": DECODER.num_heads, "hidden_size": 64, "head_dim": 64 // DECODER.num_heads}
    return with_layers(DECODER, has.layer, **own | sizes)


def random_params(config: DecoderConfig, seed: int = 0, *, head: Head = "lm") -> Tree:
    """Parameters far from their initial values: no norm scale is one, no bias or score is zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        is_scale = path[-1].key == "scale"
        noise = rng.normal(0, 0.1 if is_scale else 0.25, leaf.shape)
        return jnp.asarray(noise + (is_scale and config.norm != "rms_offset"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, forward.abstract_params(config, head=head))


def batch(prompt_len, response_len, *, width=None, seed: int = 0, vocab: int = 40) -> PromptBatch:
    """A host batch of random ids; garbage where lengths end, since masks must come from lengths alone.

    A prompt or response depends on its place in the batch, its length and `seed`, not on `width` (prompt, response).
    """
    prompt_len, response_len = np.asarray(prompt_len, np.int32), np.asarray(response_len, np.int32)
    P, S = width or (prompt_len.max(), response_len.max())
    B, N = response_len.shape
    garbage = np.random.default_rng([seed, P, S])
    prompt, response = garbage.integers(0, vocab, (B, P)), garbage.integers(0, vocab, (B, N, S))
    for b in range(B):
        prompt[b, : prompt_len[b]] = np.random.default_rng([seed, b]).integers(0, vocab, prompt_len[b])
        for n in range(N):
            ids = np.random.default_rng([seed, b, n]).integers(0, vocab, response_len[b, n])
            response[b, n, : response_len[b, n]] = ids
    return PromptBatch(
        prompt=prompt.astype(np.int32),
        prompt_len=prompt_len,
        response=response.astype(np.int32),
        response_len=response_len,
        key=np.arange(B, dtype=np.uint32) + 17,
    )


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


@lru_cache
def recorded() -> dict[str, np.ndarray]:
    """Inputs, and what transformers answers to them by each model."""
    return load_file(RECORDED / "expected.safetensors")


def recorded_tokens(config: DecoderConfig) -> Tokens:
    """The recorded inputs, with positions far apart where the frequencies are stretched."""
    segment = jnp.asarray(recorded()["attention_mask"], jnp.int32)
    positions = "far_position_ids" if config.pattern[0].rope_scaling else "position_ids"
    return Tokens(
        ids=jnp.asarray(recorded()["input_ids"], jnp.int32),
        position=jnp.asarray(recorded()[positions], jnp.int32),
        segment=segment,
        branch=jnp.zeros_like(segment),
        loss_mask=segment > 0,
    )


def load_folder(folder: Path, mesh=None, *, dtype="float32", head: Head | None = None) -> tuple[DecoderConfig, Tree]:
    """Sizes and parameters; the head is the weights' own, unless `head` says otherwise."""
    config, tensors = families.read_config(folder), SafetensorsFolder(folder)
    if head is None:
        head = "value" if "score.weight" in tensors.names() else "lm"
    return config, weights.load_params(tensors, config, mesh or mesh_of(1, 1, 1), head=head, dtype=dtype)


def answers(config: DecoderConfig, params: Tree, tokens: Tokens) -> np.ndarray:
    """Logits, or values; compiled, as the stages run it."""
    function = scores if "score" in params else logits
    return np.asarray(function(Model(config), params, tokens))


def close(actual, expected, *, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def trees_close(actual, expected, *, rtol=1e-5, atol=1e-6):
    """Leaf by leaf, `atol` relative to each leaf's largest magnitude."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        scale = np.abs(b).max() if b.size else 0.0
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, actual, expected)


def check_cached_decoding(model: Model, params: Tree, joined: PromptBatch) -> None:
    """Decodes the only response of each row token by token, behind garbage in the slots still to be written.

    Asserts that hidden states equal the full forward's, those of the prompts too. Responses fill their width.
    """
    P, S = joined.prompt.shape[1], joined.response.shape[2]
    wanted = jax.jit(forward.hidden_states, static_argnums=0)(model, params, forward.join(joined))
    prompts = dataclasses.replace(joined, response=joined.response[..., :0], response_len=0 * joined.response_len)
    hidden, cache = jax.jit(forward.prefill, static_argnums=0)(model, params, forward.join(prompts))
    prompt_len = jnp.asarray(joined.prompt_len)
    for row, length in enumerate(joined.prompt_len):
        close(hidden[row, :length], wanted[row, :length], atol=1e-4)
    half = S // 2
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, half), (0, 0)), constant_values=50.0), cache)
    recent = jax.tree.map(lambda x: jnp.full_like(x[:, :, :half], 50.0), cache)
    weights = forward.for_decoding(model, params)
    step = jax.jit(forward.decode_step, static_argnums=0)
    for t in range(S):
        if t == half:
            cache = jax.tree.map(lambda old, new: old.at[:, :, P:].set(new), cache, recent)
        stored, slot = jnp.full(len(prompt_len), t // half * half), jnp.asarray(t % half)
        visible = forward.visible_slots(model, prompt_len, (P, half, half), stored, slot)
        out, recent = step(model, weights, joined.response[:, 0, t], prompt_len + t, (cache,), recent, visible, slot)
        close(out, wanted[:, P + t], rtol=1e-4, atol=1e-4)
