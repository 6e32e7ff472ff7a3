"""mpo_jax.models.loading: whole models from folders, or from scratch, and to a folder."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mpo_jax.config.schema import ArchitectureConfig, ModelConfig, TextConfig
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.models.loading import Options
from mpo_jax.types import merge, trainable
from tests.models.tiny import DECODER, RECORDED, mesh_of, random_params, recorded_tokens


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1, 1)


def text_of(prompt: int, response: int) -> TextConfig:
    return TextConfig(max_prompt_tokens=prompt, max_response_tokens=response)


def options(**settings: Any) -> Options:
    return Options.of(ModelConfig(**settings))


def test_lengths_must_fit_the_positions():
    loading.check_positions(DECODER, text_of(32, 32))
    with pytest.raises(UserError, match=r"max_prompt_tokens=32 \+ text\.max_response_tokens=33 = 65.*64 positions"):
        loading.check_positions(DECODER, text_of(32, 33))


def test_lengths_must_fit_the_model_that_is_loaded(mesh):
    positions = families.read_config(RECORDED / "tied").max_positions
    loading.load(RECORDED / "tied", options(), mesh, text=text_of(16, positions - 16))
    with pytest.raises(UserError, match=rf"the model has {positions} positions"):
        loading.load(RECORDED / "tied", options(), mesh, text=text_of(17, positions - 16))


def test_chunks_are_counted_a_device_and_run_over_the_whole_batch():
    model = options(logit_chunk=100, remat="full").model(DECODER, mesh_of(2, 2, 2))
    assert (model.logit_chunk, model.remat, model.dtype) == (400, "full", "float32")
    assert model.decoder is DECODER


def test_tokenizer_larger_than_the_embedding():
    """A few ids more get rows of their own: see test_found.py."""
    loading.check_vocabulary(56, DECODER, "some/folder")
    with pytest.raises(UserError, match=r"some/folder: the tokenizer has 57 ids, but the embedding has 40 rows"):
        loading.check_vocabulary(57, DECODER, "some/folder")


def test_fresh_parameters_do_not_depend_on_the_mesh():
    """And all of them train."""
    decoder = loading.scratch_sizes(ArchitectureConfig(), 33)
    params = loading.init(decoder, mesh_of(1, 1, 1), jax.random.key(3))
    assert params["frozen"] == {} and decoder.vocab_size == params["trainable"]["embedding"].shape[0] == 40
    sharded = loading.init(decoder, mesh_of(2, 2, 2), jax.random.key(3))
    assert not sharded["trainable"]["embedding"].sharding.is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), sharded, params)
    other = loading.init(decoder, mesh_of(1, 1, 1), jax.random.key(4))
    assert not np.array_equal(params["trainable"]["embedding"], other["trainable"]["embedding"])


def test_heads_that_do_not_group():
    with pytest.raises(UserError, match=r"num_heads=4 is no multiple of num_kv_heads=3"):
        loading.scratch_sizes(ArchitectureConfig(num_heads=4, num_kv_heads=3), 8)


@pytest.mark.parametrize("settings", [{"frozen_dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}])
def test_frozen_models_are_stored_in_their_own_type(mesh, settings):
    """All but norms and score, which are computed in float32: so a frozen copy gives the trained model's numbers."""
    for frozen, dtype in ((False, jnp.float32), (True, jnp.bfloat16)):
        _, params = loading.load(RECORDED / "llama_score", options(**settings), mesh, head="value", frozen=frozen)
        assert not params["trainable" if frozen else "frozen"], "a model trains as a whole or not at all"
        for path, leaf in flatten_dict(merge(params)).items():
            exact = path[-1] == "scale" or path[0] == "score"
            assert leaf.dtype == (jnp.float32 if exact else dtype), path


def test_a_frozen_copy_gives_the_same_numbers_in_bfloat16(mesh):
    """PPO's actor and reference before the first update: KL exactly 0 although one is stored in half the bytes."""
    tokens = recorded_tokens(families.read_config(RECORDED / "qwen3"))
    logits = []
    for frozen in (False, True):
        model, params = loading.load(RECORDED / "qwen3", options(compute_dtype="bfloat16"), mesh, frozen=frozen)
        logits.append(np.asarray(jax.jit(forward.logits, static_argnums=0)(model, merge(params), tokens)))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_a_value_head_keeps_the_trunk_and_starts_at_zero(mesh):
    params = random_params(DECODER)
    critic = loading.with_value_head(Model(DECODER), trainable(params), mesh)
    assert critic["frozen"] == {}
    critic = critic["trainable"]
    assert critic.keys() == (params.keys() - {"head"}) | {"score"}
    assert not critic["score"]["kernel"].any() and critic["score"]["kernel"].shape == (32, 1)
    for name in critic.keys() - {"score"}:
        jax.tree.map(np.testing.assert_array_equal, critic[name], params[name])


def test_save_writes_a_folder_that_loads_again(shared_data, mesh, tmp_path):
    folder = shared_data / "models" / "stories260K"
    codec = TextCodec(load_tokenizer(folder), text_of(16, 16))
    model, params = loading.load(folder, options(), mesh)
    loading.save(tmp_path, model, params, codec.tokenizer)
    again_codec = TextCodec(load_tokenizer(tmp_path), codec.config)
    again_model, again = loading.load(tmp_path, options(), mesh)
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
        return loading.check_vocabulary(ids, decoder, "some/folder")
    with pytest.raises(UserError, match=rf"some/folder: the tokenizer has only {ids} ids.*{rows} rows"):
        loading.check_vocabulary(ids, decoder, "some/folder")


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
        loading.load(RECORDED / name, options(), mesh, head=head)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no model at .*/nowhere: no such folder"):
        loading.open_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        loading.open_model(tmp_path)
