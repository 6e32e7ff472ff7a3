"""mpo_jax.models.hf.weights: recorded answers of transformers, round trips, streaming, and what is refused."""

import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from mpo_jax.errors import UserError
from mpo_jax.models import forward
from mpo_jax.models.hf import families, weights
from mpo_jax.models.hf.safetensors_folder import SafetensorsFolder
from mpo_jax.models.hf.table import TABLE, entries
from tests.covering import the_rest_thorough
from tests.models.tiny import (
    LANGUAGE_MODELS,
    RECORDED,
    REWARD_MODELS,
    answers,
    load_folder,
    mesh_of,
    of_family,
    recorded,
    recorded_tokens,
)

NAMES = LANGUAGE_MODELS + REWARD_MODELS
SMALL_SHARDS = 6_000


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1, 1)


def export(folder, name, config, params, **options):
    """A whole exported model: configuration and weights."""
    head = "value" if name in REWARD_MODELS else "lm"
    families.save_config(folder, config, head=head, eos_id=2, bos_id=1, pad_id=0, dtype=options.get("dtype", "float32"))
    weights.save_params(folder, params, config, **options)
    return folder


def stored_tensors(folder) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers_in_float64(name, mesh):
    """Float32 against float64 on real tokens; unpadded rows and rows padded left, right and on both sides."""
    config, params = load_folder(RECORDED / name, mesh)
    tokens = recorded_tokens(config)
    real = np.asarray(tokens.loss_mask)
    assert real.sum(-1).tolist() == [11, 8, 6, 7]
    expected = recorded()[name][real]
    np.testing.assert_allclose(answers(config, params, tokens)[real], expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.9, "answers as large as a real model's"


def test_no_recorded_parameter_is_at_its_initial_value(mesh):
    """Scales of one and biases of zero would hide that they are not read."""
    for name in NAMES:
        config, params = load_folder(RECORDED / name, mesh)
        for path, leaf in flatten_dict(params, sep=".").items():
            initial = 1 if path.endswith("scale") and config.norm != "rms_offset" else 0
            assert np.abs(np.asarray(leaf) - initial).mean() > 0.05, (name, path)
        tied = ("tied", "llama3", "qwen2", "gemma2", "gemma3")
        assert ("head" in params) == (name not in tied + REWARD_MODELS)


@pytest.mark.parametrize("shard_bytes", [weights.SHARD_BYTES, SMALL_SHARDS])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_identical(name, shard_bytes, mesh, tmp_path):
    config, params = load_folder(RECORDED / name, mesh)
    export(tmp_path, name, config, params, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").is_file() == (shard_bytes > SMALL_SHARDS)
    again_config, again = load_folder(tmp_path, mesh)
    assert again_config == config
    same(again, params)


@pytest.mark.parametrize("name", NAMES)
def test_export_names_and_values_are_those_that_came_in(name, mesh, tmp_path):
    """Every tensor of the folder, under its name and in its layout: nothing lost, nothing added."""
    config, params = load_folder(RECORDED / name, mesh)
    ours, theirs = stored_tensors(export(tmp_path, name, config, params)), stored_tensors(RECORDED / name)
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor], value.astype(np.float32), err_msg=tensor)
        assert ours[tensor].dtype == np.float32


@pytest.mark.parametrize("name", ["untied", "qwen2", "qwen2_score"])
def test_shards_hold_what_the_index_says(name, mesh, tmp_path):
    config, params = load_folder(RECORDED / name, mesh)
    export(tmp_path, name, config, params, shard_bytes=SMALL_SHARDS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == {file.name for file in files}
    total = 0
    for file in files:
        tensors = load_file(file)
        assert tensors.keys() == {tensor for tensor, at in index["weight_map"].items() if at == file.name}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= SMALL_SHARDS or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total == 4 * sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["untied", "qwen3", "llama_score"])
def test_bfloat16_export_rounds_once(name, mesh, tmp_path):
    config, params = load_folder(RECORDED / name, mesh)
    export(tmp_path, name, config, params, dtype="bfloat16")
    assert {value.dtype for value in stored_tensors(tmp_path).values()} == {np.dtype(ml_dtypes.bfloat16)}
    _, again = load_folder(tmp_path, mesh)
    same(again, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), params))


def test_loaded_bfloat16_is_exact(mesh):
    """Reading bfloat16 files needs no torch and rounds nothing."""
    stored = load_file(RECORDED / "tied" / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(load_folder(RECORDED / "tied", mesh)[1]["norm"]["scale"], stored.astype(np.float32))


@pytest.mark.parametrize(("axes", "dtype"), [((1, 1, 1), "bfloat16"), ((2, 2, 2), "float32"), ((1, 8, 1), "bfloat16")])
@pytest.mark.parametrize("name", the_rest_thorough(["untied", "qwen2", "qwen3", "llama_score", "gemma2", "gpt_neox"]))
def test_placement(name, axes, dtype, mesh, tmp_path):
    """A leaf divided over devices holds what the whole one does, rounded to the storage type; exported too.

    Norms and scores are float32 whatever it is; an export has one type for all.
    """

    def exact(path) -> bool:
        return path[-1] == "scale" or path[0] == "score" or (path[-1] == "bias" and path[-2].endswith("norm"))

    config, whole = load_folder(RECORDED / name, mesh)
    _, params = load_folder(RECORDED / name, mesh_of(*axes), dtype=dtype)
    shapes = forward.abstract_params(config, head="value" if name in REWARD_MODELS else "lm")
    shardings = flatten_dict(forward.param_shardings(shapes, mesh_of(*axes)))
    leaves: dict[Any, Any] = flatten_dict(params)
    for path, leaf in leaves.items():
        assert leaf.sharding == shardings[path] and leaf.dtype == ("float32" if exact(path) else dtype), path
        assert leaf.sharding.is_fully_replicated or axes != (1, 1, 1)
    wanted = {p: np.asarray(x).astype(leaves[p].dtype) for p, x in flatten_dict(whole).items()}
    same(leaves, wanted)
    if axes == (2, 2, 2):
        q = params["layers"]["attention"]["q"]
        assert q.addressable_shards[0].data.shape == (config.num_layers, 16, 2, config.head_dim)
    again = flatten_dict(load_folder(export(tmp_path, name, config, params, dtype=dtype), mesh, dtype=dtype)[1])
    same(again, {p: x.astype(dtype).astype(x.dtype) for p, x in wanted.items()})


def test_every_parameter_has_one_entry_and_one_layout():
    for family in families.FAMILIES:
        config, table = of_family(family), entries(family)
        for head in ("lm", "value"):
            paths = {".".join(path) for path in flatten_dict(forward.abstract_params(config, head=head))}
            assert paths <= table.keys()
            used = {table[path].name: table[path] for path in paths}
            assert {path for entry in used.values() for path in entry.paths} == paths
            assert sum(len(entry.paths) for entry in used.values()) == len(paths)
    names = [entry.gguf for entry in TABLE if entry.gguf]
    assert len(set(names)) == len(names)


# ---- host memory ---------------------------------------------------------------------------------------------------


class Counting(SafetensorsFolder):
    """Counts the tensors handed out before that are still alive when the next one is read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.handed, self.most_alive = [], 0

    def read(self, name):
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.handed))
        tensor = super().read(name)
        self.handed.append(weakref.ref(tensor))
        return tensor


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_the_host_holds_one_tensor_at_a_time(axes):
    """Stored in another type than the file's, since a CPU "device" may take over an array as it is."""
    tensors, config = Counting(RECORDED / "qwen3"), families.read_config(RECORDED / "qwen3")
    weights.load_params(tensors, config, mesh_of(*axes), head="lm", dtype="float32")
    assert len(tensors.handed) == len(tensors.names())
    assert tensors.most_alive == 0


def test_export_holds_one_shard_at_a_time(mesh, tmp_path, monkeypatch):
    config, params = load_folder(RECORDED / "untied", mesh)
    fetched, written, most_kept = [], 0, 0

    def counting_fetch(self, fetch=weights._Export.fetch):
        nonlocal most_kept
        most_kept = max(most_kept, sum(ref() is not None for ref in fetched[:written]))
        tensor = fetch(self)
        fetched.append(weakref.ref(tensor))
        return tensor

    def counting_save(tensors, path, save=weights.save_tensors):
        nonlocal written
        written += len(tensors)
        save(tensors, path)

    monkeypatch.setattr(weights._Export, "fetch", counting_fetch)
    monkeypatch.setattr(weights, "save_tensors", counting_save)
    weights.save_params(tmp_path, params, config, shard_bytes=SMALL_SHARDS)
    assert most_kept == 0 and written == len(fetched) == len(stored_tensors(tmp_path))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of the tied model, to be broken."""
    return Path(shutil.copytree(RECORDED / "tied", tmp_path / "broken"))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensor(folder, mesh):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"broken: tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_folder(folder, mesh)


def test_several_missing_tensors(folder, mesh):
    change_tensors(folder, lambda tensors: [tensors.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)])
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight and 2 more are missing"):
        load_folder(folder, mesh)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_tensor_without_a_place(folder, mesh, name):
    """One layer more than config.json says; biases that the architecture does not have."""
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=rf"broken: a llama model of 3 layers has no place for {name}: the weights and"):
        load_folder(folder, mesh)


def test_many_tensors_without_a_place(folder, mesh):
    change_tensors(folder, lambda tensors: tensors.update({f"extra.{i}": np.zeros(1, np.float32) for i in range(5)}))
    with pytest.raises(UserError, match=r"no place for extra\.0, extra\.1, extra\.2 and 2 more tensors: "):
        load_folder(folder, mesh)


def test_copies_that_say_nothing_new_are_passed_over(folder, mesh):
    """Rotary frequencies of old exports, and a tied model's head."""
    _, wanted = load_folder(folder, mesh)
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32),
                "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
            }
        ),
    )
    same(load_folder(folder, mesh)[1], wanted)


def test_reward_model_of_several_labels(tmp_path, mesh):
    folder = Path(shutil.copytree(RECORDED / "llama_score", tmp_path / "broken"))
    change_tensors(folder, lambda tensors: tensors.update({"score.weight": np.zeros((3, 32), np.float32)}))
    with pytest.raises(UserError, match=r"score\.weight has shape \(3, 32\).*asks for \(1, 32\)"):
        load_folder(folder, mesh)


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
        load_folder(folder, mesh)
    assert str(folder) in str(error.value) and f"tensor {name} has shape {shape}" in str(error.value)


def test_config_of_another_size(folder, mesh):
    raw = json.loads((folder / "config.json").read_text()) | {"vocab_size": 48}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight has shape \(40, 32\).*asks for \(48, 32\)"):
        load_folder(folder, mesh)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_corrupt_weights(folder, mesh, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: (broken safetensors file|cannot read tensor)"):
        load_folder(folder, mesh)


def test_no_weights(folder, mesh):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights in .*broken: neither model\.safetensors nor") as error:
        load_folder(folder, mesh)
    assert "pickled" not in str(error.value)


def test_pickled_weights_are_never_opened(folder, mesh):
    (folder / "model.safetensors").unlink()
    marker = folder / "opened"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(marker) + b"'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled and is not read: convert it to safetensors"):
        load_folder(folder, mesh)
    assert not marker.exists()


@pytest.fixture
def sharded(tmp_path):
    """A copy of the model in two files, to be broken."""
    return Path(shutil.copytree(RECORDED / "untied", tmp_path / "broken"))


def test_index_names_an_absent_file(sharded, mesh):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json names model-00002-of-00002\.safetensors, which is not there"):
        load_folder(sharded, mesh)


def test_index_names_the_wrong_file(sharded, mesh):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert index["weight_map"]["model.norm.weight"] == "model-00002-of-00002.safetensors"
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors: the index says that tensor model\.norm"):
        load_folder(sharded, mesh)


def test_two_sets_of_weights_are_an_error_that_names_both(sharded, mesh):
    """transformers would take model.safetensors, and it can be what an earlier export has left."""
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model.safetensors")
    with pytest.raises(UserError, match=r"two sets of weights, model\.safetensors and .*\.index\.json names"):
        load_folder(sharded, mesh)


def test_an_index_of_the_single_file_is_no_second_set(folder, mesh):
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_folder(folder, mesh)


def test_an_index_names_no_file_elsewhere(sharded, mesh):
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))
    with pytest.raises(UserError, match=r"index\.json names .*model-00002.*, which is outside the folder"):
        load_folder(sharded, mesh)


def test_weights_in_their_authors_layout_alone(folder, mesh):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(UserError, match=r"consolidated\.safetensors is in its author's own layout and is not read"):
        load_folder(folder, mesh)


@pytest.mark.parametrize("text", ["{", '{"weights": {}}', "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_broken_index(folder, mesh, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: broken (index|JSON)"):
        load_folder(folder, mesh)


# ---- live comparison -----------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("shard_bytes", [weights.SHARD_BYTES, SMALL_SHARDS])
@pytest.mark.parametrize("name", NAMES)
def test_exported_folder_gives_the_same_answers_in_transformers(name, shard_bytes, mesh, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    from tests.fixtures import make_model_fixtures

    config, params = load_folder(RECORDED / name, mesh)
    export(tmp_path, name, config, params, shard_bytes=shard_bytes)
    head = "value" if name in REWARD_MODELS else "lm"
    auto = transformers.AutoModelForSequenceClassification if head == "value" else transformers.AutoModelForCausalLM
    theirs, report = auto.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = {key: torch.from_numpy(x) for key, x in recorded().items() if key not in NAMES}
    out = make_model_fixtures.answers(theirs.eval(), name, inputs).numpy()
    real = recorded()["attention_mask"] > 0
    np.testing.assert_array_equal(out.astype(np.float32)[real], recorded()[name][real])


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_folder_saved_by_the_installed_transformers_loads_here(name, mesh, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    auto = transformers.AutoModelForCausalLM
    if name in REWARD_MODELS:
        auto = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(RECORDED / name, dtype=torch.float32).save_pretrained(tmp_path)
    config, params = load_folder(RECORDED / name, mesh)
    again_config, again = load_folder(tmp_path, mesh)
    assert again_config == config
    same(again, params)
