"""Small models on disk, with the toy world's tokenizer, for the commands to open."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.data import toy
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.types import Head, trainable
from tests.models.tiny import random_params

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}TL;DR:{% endif %}"
)


@pytest.fixture(scope="session")
def decoder() -> DecoderConfig:
    vocab = -(-len(toy.make_tokenizer()) // 8) * 8
    return DecoderConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        max_positions=96, tie_embeddings=True,
    )  # fmt: skip


def write_model(folder: Path, decoder: DecoderConfig, *, head: Head = "lm", chat: bool = False, seed: int = 0) -> Path:
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    with jax.default_device(jax.devices()[0]):
        loading.save(
            folder, Model(decoder), trainable(random_params(decoder, seed, head=head)), tokenizer,
            scored_at_end=head == "value",
        )  # fmt: skip
    return folder


def damaged(model: Path, folder: Path, value: float = 3e38) -> Path:
    """A copy of the model, of which the last norm's weights are `value`: by itself a number, it makes infinities."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory, decoder) -> Path:
    return write_model(tmp_path_factory.mktemp("lm") / "model", decoder)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, decoder) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model", decoder, chat=True)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory, decoder) -> Path:
    return write_model(tmp_path_factory.mktemp("rm") / "model", decoder, head="value", seed=1)


@pytest.fixture(scope="session")
def foreign_reward_model(reward_model, tmp_path_factory) -> Path:
    """The same weights with nothing that says where training had put the score."""
    folder = Path(shutil.copytree(reward_model, tmp_path_factory.mktemp("foreign") / "model"))
    (folder / "readout.json").unlink()
    return folder
