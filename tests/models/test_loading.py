"""mpo_jax.models.loading: whole models from a configuration, and to a folder."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mpo_jax.config.schema import Config
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families
from mpo_jax.models.hf.tokenizer import load_tokenizer
from tests.models.tiny import DECODER, RECORDED, mesh_of, random_params, recorded_tokens


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1, 1)


def codec_of(vocab_size: int) -> Any:
    """All of a codec that sizes depend on."""
    return SimpleNamespace(vocab_size=vocab_size)


def config_for(prompt=16, response=16, **sections) -> Config:
    return Config.model_validate({"text": {"max_prompt_tokens": prompt, "max_response_tokens": response}, **sections})


def test_lengths_must_fit_the_positions():
    assert loading.describe(DECODER, config_for(32, 32)).decoder is DECODER
    with pytest.raises(UserError, match=r"max_prompt_tokens=32 \+ text\.max_response_tokens=33 = 65.*64 positions"):
        loading.describe(DECODER, config_for(32, 33))


def test_describe_counts_the_whole_batch():
    config = config_for(model={"logit_chunk": 100, "remat": "full"}, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    model = loading.describe(DECODER, config)
    assert (model.logit_chunk, model.remat, model.dtype) == (400, "full", "float32")


def test_tokenizer_larger_than_the_embedding():
    loading.check_vocabulary(codec_of(40), DECODER, "some/folder")
    with pytest.raises(UserError, match=r"some/folder: the tokenizer has 41 ids, but the embedding has 40 rows"):
        loading.check_vocabulary(codec_of(41), DECODER, "some/folder")


def test_load_base_refuses_the_tokenizer_of_another_model(mesh):
    config = config_for(model={"path": str(RECORDED / "tied")})
    with pytest.raises(UserError, match=r"tied: the tokenizer has 512 ids"):
        loading.load_base(config, codec_of(512), mesh, jax.random.key(0))


def test_load_base_from_scratch_pads_the_vocabulary_and_shards():
    """The drawn numbers do not depend on the mesh."""
    codec, config = codec_of(33), config_for()
    model, params = loading.load_base(config, codec, mesh_of(1, 1, 1), jax.random.key(3))
    assert model.decoder.vocab_size == params["embedding"].shape[0] == 40
    _, sharded = loading.load_base(config, codec, mesh_of(2, 2, 2), jax.random.key(3))
    assert not sharded["embedding"].sharding.is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), sharded, params)
    _, other = loading.load_base(config, codec, mesh_of(1, 1, 1), jax.random.key(4))
    assert not np.array_equal(params["embedding"], other["embedding"])


def test_load_base_refuses_heads_that_do_not_group(mesh):
    config = config_for(model={"architecture": {"num_heads": 4, "num_kv_heads": 3}})
    with pytest.raises(UserError, match=r"num_heads=4 is no multiple of num_kv_heads=3"):
        loading.load_base(config, codec_of(8), mesh, jax.random.key(0))


@pytest.mark.parametrize("settings", [{"frozen_dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}])
def test_frozen_models_are_stored_in_their_own_type(mesh, settings):
    """All but norms and score, which are computed in float32: so a frozen copy gives the trained model's numbers."""
    config = config_for(model=settings)
    for frozen, dtype in ((False, jnp.float32), (True, jnp.bfloat16)):
        _, params = loading.load(RECORDED / "llama_score", config, mesh, head="value", frozen=frozen)
        for path, leaf in flatten_dict(params).items():
            exact = path[-1] == "scale" or path[0] == "score"
            assert leaf.dtype == (jnp.float32 if exact else dtype), path


def test_a_frozen_copy_gives_the_same_numbers_in_bfloat16(mesh):
    """PPO's actor and reference before the first update: KL exactly 0 although one is stored in half the bytes."""
    config = config_for(model={"compute_dtype": "bfloat16"})
    tokens = recorded_tokens(families.read_config(RECORDED / "qwen3"))
    logits = []
    for frozen in (False, True):
        model, params = loading.load(RECORDED / "qwen3", config, mesh, frozen=frozen)
        logits.append(np.asarray(jax.jit(forward.logits, static_argnums=0)(model, params, tokens)))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_a_value_head_keeps_the_trunk_and_starts_at_zero(mesh):
    params = random_params(DECODER)
    critic = loading.with_value_head(Model(DECODER), params, mesh)
    assert critic.keys() == (params.keys() - {"head"}) | {"score"}
    assert not critic["score"]["kernel"].any() and critic["score"]["kernel"].shape == (32, 1)
    for name in critic.keys() - {"score"}:
        jax.tree.map(np.testing.assert_array_equal, critic[name], params[name])


def test_save_writes_a_folder_that_loads_again(shared_data, mesh, tmp_path):
    folder = shared_data / "models" / "stories260K"
    config = config_for(model={"path": str(folder)})
    codec = TextCodec(load_tokenizer(folder), config.text)
    model, params = loading.load_base(config, codec, mesh, jax.random.key(0))
    loading.save(tmp_path, model, params, codec)
    again_codec = TextCodec(load_tokenizer(tmp_path), config.text)
    again_model, again = loading.load(tmp_path, config, mesh)
    assert again_model == model and again_codec.prompt("Once upon a time") == codec.prompt("Once upon a time")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize(("rows", "ids", "fits"), [
    (40, 33, True), (1064, 40, True), (1065, 40, False),  # a small model's rows, rounded up
    (151936, 151665, True),  # Qwen 2.5
    (152000, 133000, True), (152000, 132999, False),  # at most an eighth
])  # fmt: skip
def test_tokenizer_much_smaller_than_the_embedding(rows, ids, fits):
    decoder = dataclasses.replace(DECODER, vocab_size=rows)
    if fits:
        return loading.check_vocabulary(codec_of(ids), decoder, "some/folder")
    with pytest.raises(UserError, match=rf"some/folder: the tokenizer has only {ids} ids.*{rows} rows"):
        loading.check_vocabulary(codec_of(ids), decoder, "some/folder")


def test_knows_a_reward_model_by_its_weights():
    assert loading.open_model(RECORDED / "qwen2_score").head == "value"
    assert loading.open_model(RECORDED / "qwen2").head == "lm"


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("llama_score", "lm", r"lm_head\.weight is missing.*this is a reward model, not a language model"),
        ("qwen2_score", "lm", r"no place for score\.weight: this is a reward model, not a language model"),
        ("untied", "value", r"score\.weight is missing.*this is a language model, not a reward model"),
        ("tied", "value", r"score\.weight is missing.*this is a language model, not a reward model"),
    ],
)
def test_the_other_kind_of_model(name, head, message, mesh):
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        loading.load(RECORDED / name, config_for(), mesh, head=head)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no model at .*/nowhere: no such folder"):
        loading.open_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        loading.open_model(tmp_path)
