"""A model's sizes without its weights."""

import json

import jax
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.errors import UserError
from mpo_jax.models import forward
from mpo_jax.tools.plan import sizes
from tests.pipeline.test_pipeline import MICRO


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
    ],
)
def test_published_numbers_of_parameters(name, parameters):
    params = forward.abstract_params(sizes.KNOWN[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_where_sizes_come_from(tmp_path):
    toy, source = sizes.decoder_sizes(load_config(MICRO))
    assert source == "model.architecture" and toy.hidden_size == 32 and toy.vocab_size % 8 == 0
    known, source = sizes.decoder_sizes(load_config(MICRO, ("model.path=meta-llama/Llama-2-7b-hf",)))
    assert known is sizes.LLAMA_2_7B and "published" in source
    config = {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    local, source = sizes.decoder_sizes(load_config(MICRO, (f"model.path={tmp_path}",)))
    assert (local.num_kv_heads, source) == (2, str(tmp_path))


def test_an_unknown_model_without_a_hub(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(sizes.huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"no sizes for model.path=org/name: no such folder.*OSError"):
        sizes.decoder_sizes(load_config(MICRO, ("model.path=org/name",)))


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"no model at models/absent.gguf: no such folder or .gguf file"):
        sizes.decoder_sizes(load_config(MICRO, ("model.path=models/absent.gguf",)))
