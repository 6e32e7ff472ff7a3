"""mpo_jax.model.weights and loading: recorded answers of transformers, the round trip, and what is refused.

tests/fixtures/make_llama_fixture.py made the recorded folders.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from mpo_jax.config import Config
from mpo_jax.errors import UserError
from mpo_jax.model import functional, loading, weights
from mpo_jax.model.functional import Model
from mpo_jax.text import TextCodec, load_tokenizer
from mpo_jax.types import Tokens
from tests.model.tiny import DECODER, mesh_of, random_params

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "llama"
NAMES = ("untied", "tied", "score")


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1, 1)


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


def load(folder, mesh, dtype="float32", scalar=None):
    config = weights.read_config(folder)
    scalar = folder.name == "score" if scalar is None else scalar
    return config, weights.load_params(folder, config, mesh, scalar=scalar, dtype=dtype)


def tokens_of(arrays) -> Tokens:
    segment = jnp.asarray(arrays["attention_mask"], jnp.int32)
    return Tokens(
        ids=jnp.asarray(arrays["input_ids"], jnp.int32),
        position=jnp.asarray(arrays["position_ids"], jnp.int32),
        segment=segment,
        branch=jnp.zeros_like(segment),
        loss_mask=segment > 0,
    )


def answers(config, params, tokens):
    """What the fixture recorded: logits, or scores of a scalar model; compiled, as the stages run it."""
    function = functional.scores if "score" in params else functional.logits
    return np.asarray(jax.jit(function, static_argnums=0)(Model(config), params, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers_in_float64(name, mesh, expected):
    """Float32 against float64 on real tokens; unpadded rows and rows padded left, right and on both sides."""
    config, params = load(FIXTURE / name, mesh)
    tokens = tokens_of(expected)
    real = np.asarray(tokens.loss_mask)
    assert real.sum(-1).tolist() == [11, 8, 6, 7]
    np.testing.assert_allclose(answers(config, params, tokens)[real], expected[name][real], rtol=1e-5, atol=1e-5)
    assert expected[name][real].std() > 1, "answers as large as a real model's"


def test_reads_the_sizes(mesh):
    untied, tied = weights.read_config(FIXTURE / "untied"), weights.read_config(FIXTURE / "tied")
    assert (untied.num_heads, untied.num_kv_heads, untied.head_dim, untied.norm_eps) == (4, 2, 8, 1e-3)
    assert (tied.num_kv_heads, tied.head_dim, tied.tie_embeddings, tied.rope_theta) == (1, 12, True, 500.0)
    assert (untied.vocab_size, untied.hidden_size, untied.intermediate_size, untied.max_positions) == (40, 32, 36, 64)
    assert (untied.num_layers, tied.num_layers, untied.tie_embeddings, untied.rope_theta) == (2, 3, False, 10000.0)
    assert "head" not in load(FIXTURE / "tied", mesh)[1]


def test_reads_a_config_of_older_transformers(tmp_path):
    """Before version 5 rope_theta stood at the top, and fields with defaults could be absent."""
    raw = json.loads((FIXTURE / "tied" / "config.json").read_text())
    del raw["rope_parameters"], raw["head_dim"], raw["num_key_value_heads"], raw["dtype"]
    raw |= {"rope_theta": 1234.0, "rope_scaling": None, "torch_dtype": "float16", "transformers_version": "4.31.0"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = weights.read_config(tmp_path)
    assert (config.rope_theta, config.head_dim, config.num_kv_heads) == (1234.0, 8, 4)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_identical(name, mesh, tmp_path):
    config, params = load(FIXTURE / name, mesh)
    weights.save_params(tmp_path, params, config, eos_id=2, bos_id=1)
    again_config, again = load(tmp_path, mesh, scalar=name == "score")
    assert again_config == config
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_export_names_and_values_are_those_that_came_in(mesh, tmp_path):
    """Every tensor of the folder, under its name and in its layout: nothing lost, nothing added."""
    config, params = load(FIXTURE / "untied", mesh)
    weights.save_params(tmp_path, params, config, eos_id=2, bos_id=1)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = {k: v for file in sorted((FIXTURE / "untied").glob("*.safetensors")) for k, v in load_file(file).items()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
        assert ours[name].dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_exported_config_is_read_by_transformers(name, mesh, tmp_path):
    config, params = load(FIXTURE / name, mesh)
    weights.save_params(tmp_path, params, config, eos_id=7, bos_id=None)
    read, original = AutoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(FIXTURE / name)
    assert isinstance(read, LlamaConfig)
    for field in (
        "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias", "initializer_range",
    ):  # fmt: skip
        assert getattr(read, field) == getattr(original, field), field
    assert (read.eos_token_id, read.bos_token_id, str(read.dtype).removeprefix("torch.")) == (7, None, "float32")
    if name == "score":
        assert read.num_labels == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_storage_type_and_placement(dtype):
    """A leaf divided over devices holds exactly what the whole one does, rounded to the storage type."""
    mesh = mesh_of(2, 2, 2)
    _, whole = load(FIXTURE / "untied", mesh_of(1, 1, 1))
    config, params = load(FIXTURE / "untied", mesh, dtype)
    shardings = functional.param_shardings(functional.abstract_params(config), mesh)
    jax.tree.map(lambda leaf, sharding: check_equal(leaf.sharding, sharding), params, shardings)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(a.dtype)), params, whole)
    assert not params["layers"]["attention"]["q"].sharding.is_fully_replicated
    assert params["layers"]["attention"]["q"].addressable_shards[0].data.shape == (2, 16, 2, 8)


def check_equal(actual, wanted):
    assert actual == wanted


def test_every_parameter_has_one_entry_and_one_layout():
    for scalar in (False, True):
        paths = {".".join(path) for path in flatten_dict(functional.abstract_params(DECODER, scalar=scalar))}
        assert paths <= weights.ENTRIES.keys()
    assert len({entry.name for entry in weights.TABLE}) == len(weights.TABLE) == len(weights.ENTRIES)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of the tied model, to be broken."""
    return Path(shutil.copytree(FIXTURE / "tied", tmp_path / "broken"))


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"broken: config\.json is missing"):
        weights.read_config(folder)


@pytest.mark.parametrize("text", ['{"model_type": "llama",', "[1, 2]", "\ufffe"])
def test_broken_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-16" if text == "\ufffe" else "utf-8"))
    with pytest.raises(UserError, match=r"config\.json: broken JSON"):
        weights.read_config(folder)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)  # fmt: skip
def test_unsupported_option(folder, changes, names):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=f"config.json: {names} is not supported"):
        weights.read_config(folder)


def test_config_that_transformers_refuses(folder):
    change_config(folder, num_hidden_layers="many")
    with pytest.raises(UserError, match=r"config\.json: .*num_hidden_layers"):
        weights.read_config(folder)


def test_missing_tensor(folder, mesh):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"broken: tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(folder, mesh)


def test_language_model_is_no_reward_model(folder, mesh):
    with pytest.raises(UserError, match=r"tensor score\.weight is missing"):
        load(folder, mesh, scalar=True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.2.self_attn.q_proj.weight", (48, 31)),  # a later layer alone
        ("model.layers.0.self_attn.k_proj.weight", (13, 32)),  # does not divide into heads
        ("model.layers.0.self_attn.o_proj.weight", (48, 32)),  # transposed
        ("model.layers.1.mlp.down_proj.weight", (36,)),
        ("model.embed_tokens.weight", (41, 32)),
    ],
)
def test_tensor_of_another_shape(folder, mesh, name, shape):
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros(shape, np.float32)}))
    with pytest.raises(UserError) as error:
        load(folder, mesh)
    assert str(folder) in str(error.value) and f"tensor {name} has shape {shape}" in str(error.value)


def test_config_of_another_size(folder, mesh):
    change_config(folder, vocab_size=48)
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight has shape \(40, 32\).*asks for \(48, 32\)"):
        load(folder, mesh)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_corrupt_weights(folder, mesh, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: (broken safetensors file|cannot read tensor)"):
        load(folder, mesh)


def test_no_weights(folder, mesh):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights in .*broken: neither model\.safetensors nor"):
        load(folder, mesh)


def test_index_names_an_absent_file(tmp_path, mesh):
    folder = Path(shutil.copytree(FIXTURE / "untied", tmp_path / "broken"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: cannot read tensor"):
        load(folder, mesh)


@pytest.mark.parametrize("text", ["{", '{"weights": {}}', "[]"])
def test_broken_index(folder, mesh, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: broken index"):
        load(folder, mesh)


# ---- whole models --------------------------------------------------------------------------------------------------


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
    loading.check_vocabulary(SimpleNamespace(vocab_size=40), DECODER, "some/folder")
    with pytest.raises(UserError, match=r"some/folder: the tokenizer has 41 ids, but the embedding has 40 rows"):
        loading.check_vocabulary(SimpleNamespace(vocab_size=41), DECODER, "some/folder")


def test_load_base_refuses_the_tokenizer_of_another_model(mesh):
    config = config_for(model={"path": str(FIXTURE / "tied")})
    with pytest.raises(UserError, match=r"tied: the tokenizer has 512 ids"):
        loading.load_base(config, SimpleNamespace(vocab_size=512), mesh, jax.random.key(0))


def test_load_base_from_scratch_pads_the_vocabulary_and_shards():
    """The drawn numbers do not depend on the mesh."""
    codec, config = SimpleNamespace(vocab_size=33), config_for()
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
        loading.load_base(config, SimpleNamespace(vocab_size=8), mesh, jax.random.key(0))


def test_frozen_models_are_stored_in_their_own_type(mesh):
    config = config_for(model={"frozen_dtype": "bfloat16"})
    for frozen, dtype in ((False, jnp.float32), (True, jnp.bfloat16)):
        _, params = loading.load(FIXTURE / "score", config, mesh, scalar=True, frozen=frozen)
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}


def test_to_scalar_keeps_the_trunk_and_starts_at_zero(mesh):
    params = random_params(DECODER)
    scalar = loading.to_scalar(Model(DECODER), params, mesh)
    assert scalar.keys() == (params.keys() - {"head"}) | {"score"}
    assert not scalar["score"]["kernel"].any() and scalar["score"]["kernel"].shape == (32, 1)
    for name in scalar.keys() - {"score"}:
        jax.tree.map(np.testing.assert_array_equal, scalar[name], params[name])


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


def test_loaded_bfloat16_is_exact(mesh):
    """Reading bfloat16 files needs no torch and rounds nothing."""
    stored = load_file(FIXTURE / "tied" / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(load(FIXTURE / "tied", mesh)[1]["norm"]["scale"], stored.astype(np.float32))


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_exported_folder_gives_the_same_answers_in_transformers(name, mesh, expected, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config, params = load(FIXTURE / name, mesh)
    weights.save_params(tmp_path, params, config, eos_id=2, bos_id=1)
    scalar = name == "score"
    auto = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    theirs, report = auto.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    real = expected["attention_mask"] > 0
    for row in range(len(real)):
        inputs = {
            k: torch.from_numpy(expected[k][row : row + 1]) for k in ("input_ids", "attention_mask", "position_ids")
        }
        with torch.no_grad():
            out = theirs(**inputs).logits[0].numpy() if not scalar else None
            if scalar:
                out = theirs.score(theirs.model(**inputs).last_hidden_state)[0, :, 0].numpy()
        np.testing.assert_allclose(out[real[row]], expected[name][row][real[row]], rtol=0, atol=1e-12)
