"""mpo_jax.models.gguf.weights and gguf_file: files as llama.cpp's converters write them, and broken ones.

The files are written here from the recorded Hugging Face folders; names come from the gguf package's own tables.
"""

import dataclasses
import time
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.gguf import weights as gguf_weights
from mpo_jax.models.gguf.file import GgufFile
from mpo_jax.models.gguf.tokenizer import read_tokenizer
from mpo_jax.models.hf import families, weights
from mpo_jax.models.spec import DecoderConfig, LayerSpec, RopeScaling
from mpo_jax.types import Tokens
from tests.gguf_files import write_gguf
from tests.models.tiny import RECORDED, answers, load_folder, mesh_of, recorded_tokens, with_layers

Kind = gguf.GGMLQuantizationType
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
NAMES = ("untied", "tied", "llama3", "linear", "qwen2", "qwen3")
LLAMA31 = RopeScaling("llama3", 8.0)


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1, 1)


def config_of(name: str) -> DecoderConfig:
    """The recorded sizes; GGUF holds no drawing scale, and Llama 3's scaling only with the constants of Llama 3.1."""
    config = dataclasses.replace(families.read_config(RECORDED / name), init_std=0.02)
    return config if name != "llama3" else with_layers(config, LayerSpec(rope_scaling=LLAMA31, rope_theta=500000.0))


def metadata_of(config: DecoderConfig) -> dict:
    values = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.pattern[0].rope_theta,
    }
    if config.family == "llama":
        values |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    scaling = config.pattern[0].rope_scaling
    if scaling and scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    return {
        "general.architecture": config.family,
        **{f"{config.family}.{key}": value for key, value in values.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
    }


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of query and key: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def rope_divisors(config: DecoderConfig, old_length: float = 8192.0) -> np.ndarray:
    """As the converter computes them, one frequency at a time."""
    divisors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.pattern[0].rope_theta ** (i / config.head_dim)
        smooth = (old_length / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < old_length / 4.0:
            divisors.append(1.0)
        elif wavelength > old_length / 1.0:
            divisors.append(8.0)
        else:
            divisors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(divisors, np.float32)


def tensors_of(name: str, config: DecoderConfig) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.family], config.num_layers)
    tensors = {}
    for file in sorted((RECORDED / name).glob("*.safetensors")):
        for hf_name, tensor in load_file(file).items():
            tensor = tensor.astype(np.float32)
            if config.family == "llama" and ".q_proj" in hf_name:
                tensor = permuted(tensor, config.num_heads)
            if config.family == "llama" and ".k_proj" in hf_name:
                tensor = permuted(tensor, config.num_kv_heads)
            found = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            tensors[found or {"score.weight": "cls.output.weight"}[hf_name]] = tensor
    scaling = config.pattern[0].rope_scaling
    if scaling and scaling.kind == "llama3":
        tensors["rope_freqs.weight"] = rope_divisors(config)
    return tensors


def write(path: Path, name: str, *, kind=Kind.F32, drop=(), **changes) -> Path:
    """A recorded model as a GGUF file: matrices of type `kind`, norms and biases float32."""
    config = config_of(name)
    tensors = tensors_of(name, config)
    metadata = {key: value for key, value in (metadata_of(config) | changes).items() if key not in drop}
    matrices = {tensor: kind for tensor, value in tensors.items() if value.ndim == 2}
    return write_gguf(path, metadata, tensors, matrices)


def load(path, mesh):
    source = loading.open_model(path)
    return source.decoder, weights.load_params(source.tensors, source.decoder, mesh, head="lm", dtype="float32")


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_hugging_face_folder(name, mesh, tmp_path):
    """Sizes, parameters bit by bit, answers, and the folder that is exported from it."""
    path = write(tmp_path / "model.gguf", name)
    config, params = load(path, mesh)
    assert config == config_of(name)
    hf_config, wanted = load_folder(RECORDED / name, mesh)
    same(params, wanted)
    tokens = recorded_tokens(hf_config)
    np.testing.assert_array_equal(answers(config, params, tokens), answers(config_of(name), wanted, tokens))
    weights.save_params(tmp_path / "export", params, config)
    families.save_config(tmp_path / "export", config, head="lm", eos_id=2, bos_id=1)
    again_config, again = load_folder(tmp_path / "export", mesh)
    assert again_config == config
    same(again, wanted)


@pytest.mark.parametrize("name", ["linear", "qwen2", "qwen3"])
def test_float16_weights_are_exact(name, mesh, tmp_path):
    """The recorded weights are float16 themselves."""
    same(load(write(tmp_path / "model.gguf", name, kind=Kind.F16), mesh)[1], load_folder(RECORDED / name, mesh)[1])


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("name", ["linear", "qwen3"])
def test_quantised_weights_are_what_gguf_makes_of_them(name, kind, mesh, tmp_path):
    """Quantised before the rows are put back in order, so that the blocks are llama.cpp's."""
    config, params = load(write(tmp_path / "model.gguf", name, kind=kind), mesh)
    _, exact = load_folder(RECORDED / name, mesh)
    stored = tensors_of(name, config)
    quantised = lambda tensor: gguf.dequantize(gguf.quantize(stored[tensor], kind), kind)  # noqa: E731
    np.testing.assert_array_equal(params["embedding"], quantised("token_embd.weight"))
    np.testing.assert_array_equal(params["head"].T, quantised("output.weight"))
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"][1].T, quantised("blk.1.ffn_up.weight"))
    np.testing.assert_array_equal(params["layers"]["mlp_norm"]["scale"], exact["layers"]["mlp_norm"]["scale"])
    step = 0.2 if kind == Kind.Q4_0 else 0.012
    for projection in ("q", "k", "v"):
        ours, wanted = (np.asarray(p["layers"]["attention"][projection]) for p in (params, exact))
        assert 0 < np.abs(ours - wanted).max() < step * np.abs(wanted).max(), projection
    wanted = answers(config, exact, recorded_tokens(config))
    ours = answers(config, params, recorded_tokens(config))
    assert np.corrcoef(ours.ravel(), wanted.ravel())[0, 1] > (0.9 if kind == Kind.Q4_0 else 0.999)


def test_reward_model(mesh, tmp_path):
    """A classifier's head is cls.output."""
    config = config_of("llama_score")
    tensors = tensors_of("llama_score", config)
    assert "cls.output.weight" in tensors and "output.weight" not in tensors
    path = write_gguf(tmp_path / "model.gguf", metadata_of(config), tensors, {})
    source = loading.open_model(path)
    assert source.head == "value"
    params = weights.load_params(source.tensors, source.decoder, mesh, head="value", dtype="float32")
    same(params, load_folder(RECORDED / "llama_score", mesh)[1])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "phi3"}, "general.architecture='phi3' is not supported; supported: llama, qwen2, q"),
        ({"general.architecture": "mistral"}, "general.architecture='mistral' is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4 of 8 is not supported"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"llama.attention.head_count_kv=\[2, 2\] is not supported"),
        ({"llama.block_count": "2"}, "llama.block_count='2' is not supported: expected one number"),
        ({"llama.block_count": 3}, "llama.block_count=3, but there are tensors of 2 layers"),
        ({"llama.block_count": 1}, "llama.block_count=1, but there are tensors of 2 layers"),
        ({"llama.attention.head_count": 0}, "num_heads=0 must be positive"),
        ({"llama.attention.head_count_kv": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"split.count": 3}, "is one of several parts: join them"),
    ],
)
def test_unsupported(changes, message, tmp_path):
    path = write(tmp_path / "model.gguf", "untied", **changes)
    with pytest.raises(UserError, match=rf"model\.gguf:? {message}"):
        loading.open_model(path)


@pytest.mark.parametrize("factor", ["x", [1.0], ["x"]], ids=str)
def test_a_factor_that_is_no_number(factor, tmp_path):
    path = write(
        tmp_path / "model.gguf", "untied", **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": factor}
    )
    with pytest.raises(UserError, match=r"llama\.rope\.scaling\.factor must be a number, not"):
        loading.open_model(path)


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
        "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon",
    ],
)  # fmt: skip
def test_missing_metadata(key, tmp_path):
    path = write(tmp_path / "model.gguf", "untied", drop={key})
    with pytest.raises(UserError, match=rf"model\.gguf: the GGUF metadata has no {key}"):
        loading.open_model(path)


def test_other_scalings_by_factors(tmp_path):
    """Factors of another formula (Phi-3's) must not pass for Llama 3's."""
    config = config_of("llama3")
    tensors = tensors_of("llama3", config) | {"rope_freqs.weight": np.array([1, 2, 3, 4, 5, 8], np.float32)}
    path = write_gguf(tmp_path / "model.gguf", metadata_of(config), tensors, {})
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the scaling of Llama 3\.1"):
        loading.open_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda t: t.update({"blk.0.ffn_gate_exps.weight": np.zeros((2, 32))}), r"no place for blk\.0\.ffn_gate_exps"),
        (lambda t: t["blk.0.attn_norm.weight"].fill(np.nan), r"tensor blk\.0\.attn_norm\.weight holds infinite or und"),
        (lambda t: t.update({"blk.0.attn_q.weight": np.zeros((30, 32))}), r"q_proj\.weight has shape \(30, 32\)"),
    ],
)
def test_tensors_that_do_not_fit(change, message, mesh, tmp_path):
    config = config_of("untied")
    tensors = tensors_of("untied", config)
    change(tensors)
    path = write_gguf(tmp_path / "model.gguf", metadata_of(config), tensors, {})
    with pytest.raises(UserError, match=rf"model\.gguf: .*{message}"):
        load(path, mesh)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", "qwen2", kind=Kind.Q8_0)


def read_all(path):
    """Everything of a file that an import reads."""
    file = GgufFile(path)
    for key in file.fields:
        file.get(key)
    gguf_weights.read_config(path)
    tensors = gguf_weights.GgufTensors(path)
    for name in tensors.names():
        tensors.read(name)


def test_cut_short_anywhere(intact, tmp_path):
    """In the header, the metadata, a string, an array, the tensors' descriptions, and their data."""
    whole = intact.read_bytes()
    cuts = sorted({0, 1, 3, 4, 7, 8, 20, 24, *range(25, 4000, 97), *np.linspace(4000, len(whole) - 33, 20).astype(int)})
    for cut in cuts:
        path = tmp_path / f"cut-{cut}.gguf"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"cut-{cut}\.gguf: corrupt or incomplete GGUF file: \w"):
            loading.open_model(path)


@pytest.mark.parametrize("start", [b"GGML", b"\x00\x00\x00\x00", b"PK\x03\x04"])
def test_wrong_magic(start, intact, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(start + intact.read_bytes()[4:])
    with pytest.raises(UserError, match=r"model\.gguf: corrupt or incomplete GGUF file: GGUF magic invalid"):
        loading.open_model(path)


def test_an_array_of_impossible_length_ends_with_the_file(intact, tmp_path):
    """The package's own reader would count up to it."""
    whole = intact.read_bytes()
    at = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    assert int.from_bytes(whole[at : at + 8], "little") == 40
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:at] + (2**60).to_bytes(8, "little") + whole[at + 8 :])
    start = time.monotonic()
    with pytest.raises(UserError, match="corrupt or incomplete GGUF file: it ends at byte"):
        loading.open_model(path)
    assert time.monotonic() - start < 20


@given(st.lists(st.tuples(st.integers(0, 4500), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_of_the_description(tmp_path_factory, intact, flips):
    """Nothing but a UserError, or a file that happens to make sense."""
    damaged = bytearray(intact.read_bytes())
    for position, bits in flips:
        damaged[position] ^= bits
    path = tmp_path_factory.mktemp("flipped") / "model.gguf"
    path.write_bytes(damaged)
    try:
        read_all(path)
    except UserError as error:
        assert "model.gguf" in str(error)


# ---- a real file ---------------------------------------------------------------------------------------------------


def test_real_file(smollm2, mesh):
    """The most likely next word of a well-known sentence: every part must be right for that."""
    tokenizer = read_tokenizer(smollm2)
    config, params = load(smollm2, mesh)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert config.pattern == (LayerSpec(rope_theta=100000.0),)
    ids = jnp.asarray([tokenizer("The capital of France is").input_ids])
    ones = jnp.ones_like(ids)
    tokens = Tokens(ids=ids, position=jnp.arange(ids.shape[1])[None], segment=ones, branch=0 * ones, loss_mask=ones > 0)
    assert tokenizer.decode([int(answers(config, params, tokens)[0, -1].argmax())]) == " Paris"
