"""A model's sizes without its weights: from its folder, the table below, or the hub's config.json."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub

from mpo_jax.config.schema import Config
from mpo_jax.data.corpus import base_tokenizer
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.hf import families
from mpo_jax.models.hf.hub import hub_id
from mpo_jax.models.spec import DecoderConfig, LayerSpec, RopeScaling

LLAMA_2_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=4096,
)
LLAMA_2_13B = replace(
    LLAMA_2_7B, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40
)
LLAMA_2_70B = replace(
    LLAMA_2_7B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8
)
MISTRAL_7B = replace(
    LLAMA_2_7B,
    intermediate_size=14336,
    num_kv_heads=8,
    max_positions=32768,
    family="mistral",
    pattern=(LayerSpec(window=4096),),
)
LLAMA_3 = RopeScaling(kind="llama3", factor=8.0)
LLAMA_31_8B = replace(
    LLAMA_2_7B,
    vocab_size=128256,
    intermediate_size=14336,
    num_kv_heads=8,
    max_positions=131072,
    pattern=(LayerSpec(rope_theta=500000.0, rope_scaling=LLAMA_3),),
)
LLAMA_32_3B = replace(
    LLAMA_31_8B,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=28,
    num_heads=24,
    tie_embeddings=True,
    pattern=(LayerSpec(rope_theta=500000.0, rope_scaling=replace(LLAMA_3, factor=32.0)),),
)
LLAMA_32_1B = replace(LLAMA_32_3B, hidden_size=2048, num_layers=16, num_heads=32, head_dim=64)
QWEN_25_05B = DecoderConfig(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    max_positions=32768,
    norm_eps=1e-6,
    tie_embeddings=True,
    family="qwen2",
    pattern=(LayerSpec(rope_theta=1000000.0, qkv_bias=True),),
)

KNOWN: dict[str, DecoderConfig] = {
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Llama-2-13b-hf": LLAMA_2_13B,
    "meta-llama/Llama-2-70b-hf": LLAMA_2_70B,
    "meta-llama/Llama-3.1-8B": LLAMA_31_8B,
    "meta-llama/Llama-3.2-1B": LLAMA_32_1B,
    "meta-llama/Llama-3.2-3B": LLAMA_32_3B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "Qwen/Qwen2.5-0.5B": QWEN_25_05B,
}
"""Sizes from the published config.json; several of these repositories are gated, and a plan needs no weights."""


def decoder_sizes(config: Config) -> tuple[DecoderConfig, str]:
    """The base model's sizes, and a description of their source.

    Raises:
      UserError: if the model's sizes cannot be found.
    """
    path = config.model.path
    if path is None:
        codec = TextCodec(base_tokenizer(config), config.text)
        return loading.scratch_sizes(config.model.architecture, codec.vocab_size), "model.architecture"
    local = Path(path).expanduser()
    if local.is_dir():
        return families.read_config(local), path
    if local.exists():
        return loading.open_model(path).decoder, path
    repository, revision = hub_id(path)
    if repository in KNOWN:
        return KNOWN[repository], f"the published sizes of {repository}"
    try:
        file = huggingface_hub.hf_hub_download(repository, "config.json", revision=revision)
    except Exception as error:  # OSError, and the HTTP libraries' own errors
        raise UserError(
            f"no sizes for model.path={path}: no such folder, none of {', '.join(KNOWN)}, and its config.json could "
            f"not be fetched from the hub ({type(error).__name__})"
        ) from error
    return families.read_config(Path(file).parent), f"config.json of {path}"
