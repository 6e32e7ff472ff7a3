"""mpo_jax.models.hf.peft: adapter folders, written in PEFT's layout and read as whole models."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.config.schema import AdapterConfig
from mpo_jax.errors import UserError
from mpo_jax.models import adapter, loading
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import peft, peft_config
from mpo_jax.models.loading import Options
from mpo_jax.types import Tree, merge
from tests.models.tiny import RECORDED, mesh_of

TARGETS = ("q", "o", "down")


def trained(base: Path, adapted: Adapter, head: str = "lm") -> tuple[Model, Tree]:
    """A recorded model with adapters whose B is not zero."""
    mesh = mesh_of(1, 1, 1)
    model, params = loading.load(base, Options(), mesh, head=head, frozen=True)
    config = AdapterConfig(rank=adapted.rank, alpha=adapted.alpha, targets=tuple(f"{t}_proj" for t in adapted.targets),
                           rslora=adapted.rslora)  # fmt: skip
    model, params = loading.adapt(model, params, config, mesh, jax.random.key(0))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), params["trainable"])
    return model, {"trainable": moved, "frozen": params["frozen"]}


def written(folder: Path, base: Path, model: Model, params: Tree, head: str = "lm") -> Path:
    assert model.adapter is not None
    peft_config.save_settings(folder, model.adapter, model.decoder, base=str(base), head=head)
    peft.save_weights(folder, params["trainable"], model.decoder)
    return folder


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["untied", "mistral", "qwen2", "gemma2", "gemma3", "olmo2", "gpt_neox"])
def test_a_folder_reads_back_as_the_folded_model(tmp_path, name, rslora):
    base = RECORDED / name
    # of GPT-NeoX, whose query, key and value are one matrix, all three or none
    targets = ("q", "k", "v", "o", "down") if name == "gpt_neox" else TARGETS
    model, params = trained(base, Adapter(2, 3.0, targets, rslora))
    folder = written(tmp_path / "adapter", base, model, params)
    _, found = loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)
    wanted = adapter.folded(merge(params), model.adapter, "float32")
    for ours, theirs in zip(jax.tree.leaves(wanted), jax.tree.leaves(found["frozen"]), strict=True):
        # two sums of the same float32 products in another order
        assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not np.allclose(found["frozen"]["layers"]["attention"]["o"], params["frozen"]["layers"]["attention"]["o"])


def test_the_layout_is_peft_s(tmp_path):
    """A [rank in], B [out rank], named after the modules; PEFT's own reading is checked in the parity tests."""
    base = RECORDED / "untied"
    model, params = trained(base, Adapter(2, 4.0, ("q", "o")))
    folder = written(tmp_path / "adapter", base, model, params)
    held = load_file(folder / peft.WEIGHTS)
    sizes = model.decoder
    heads = sizes.num_heads * sizes.head_dim
    stem = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    places = [(i, name, side) for i in range(sizes.num_layers) for name in ("q_proj", "o_proj") for side in "AB"]
    assert set(held) == {stem.format(*place) for place in places}
    assert held[stem.format(0, "q_proj", "A")].shape == (2, sizes.hidden_size)
    assert held[stem.format(0, "q_proj", "B")].shape == (heads, 2)
    assert held[stem.format(0, "o_proj", "A")].shape == (2, heads)
    assert held[stem.format(0, "o_proj", "B")].shape == (sizes.hidden_size, 2)
    settings = json.loads((folder / peft_config.CONFIG).read_text())
    assert settings["target_modules"] == ["q_proj", "o_proj"] and settings["r"] == 2 and settings["lora_alpha"] == 4


def test_a_reward_model_s_head_is_saved_whole(tmp_path):
    base = RECORDED / "llama_score"
    model, params = trained(base, Adapter(2, 3.0, TARGETS), "value")
    folder = written(tmp_path / "adapter", base, model, params, "value")
    source = loading.open_model(folder)
    assert source.head == "value"
    _, found = loading.load(folder, Options(), mesh_of(1, 1, 1), head="value", frozen=True)
    assert np.array_equal(found["frozen"]["score"]["kernel"], params["trainable"]["score"]["kernel"])
    assert json.loads((folder / peft_config.CONFIG).read_text())["modules_to_save"] == ["score"]


BROKEN = {
    "peft_type": ("IA3", "only LORA is"),
    "use_dora": (True, "use_dora"),
    "alpha_pattern": ({"q_.*": 3}, "alpha_pattern"),
    "init_lora_weights": ("pissa", "init_lora_weights"),
    "layer_replication": ([[0, 2]], "layer_replication"),
    "bias": ("all", "bias"),
    "lora_alpha": ("much", "not a number"),
    "base_model_name_or_path": (None, "base_model_name_or_path is missing"),
    "r": (0, "r=0 is not a whole number above 0"),
    "rank_pattern": ({"q_proj": 1.5}, r"rank_pattern\.q_proj=1\.5 is not a whole number"),
    "use_rslora": ("false", "use_rslora='false' is neither true nor false"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens"),
    "trainable_token_indices": ([1], "trainable_token_indices"),
    "target_parameters": (["experts"], "target_parameters"),
    "use_qalora": (True, "use_qalora"),
    "arrow_config": ({"top_k": 2}, "arrow_config"),
    "of_a_later_version": ("new", "of_a_later_version='new' is not supported"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_other_methods_are_refused_by_key(tmp_path, key):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    value, message = BROKEN[key]
    settings = json.loads((folder / peft_config.CONFIG).read_text()) | {key: value}
    (folder / peft_config.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as raised:
        loading.open_model(folder)
    assert str(folder / peft_config.CONFIG) in str(raised.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_numbers_of_settings_are_finite(tmp_path, value):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    text = (folder / peft_config.CONFIG).read_text()
    (folder / peft_config.CONFIG).write_text(text.replace('"lora_alpha": 3', f'"lora_alpha": {value}'))
    with pytest.raises(UserError, match=r"lora_alpha=(nan|inf) is not a number"):
        loading.open_model(folder)


def test_settings_of_training_alone_change_nothing(tmp_path):
    """As PEFT 0.21 writes them all, and what training alone uses."""
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    settings = json.loads((folder / peft_config.CONFIG).read_text())
    unused = dict.fromkeys(
        ["arrow_config", "use_bdlora", "kasa_config", "layer_replication", "trainable_token_indices"]
    )
    trained_by = {
        "lora_dropout": 0.1, "peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16,
        "loftq_config": {}, "layers_to_transform": [0], "init_lora_weights": "gaussian",
    }  # fmt: skip
    wanted = loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)[1]
    (folder / peft_config.CONFIG).write_text(json.dumps(settings | unused | trained_by))
    found = loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, wanted, found))


def test_damaged_and_contradictory_tensors_are_refused(tmp_path):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    held = load_file(folder / peft.WEIGHTS)
    name = next(name for name in held if name.endswith("q_proj.lora_A.weight"))
    whole = name.replace(".lora_A", "")
    kernel = loading.open_model(base).tensors.read(whole.removeprefix(peft.PREFIX))
    for tensors, message in (
        ({}, "holds no adapters, so the model would be its base unchanged"),
        ({**held, name: held[name] * np.nan}, rf"tensor {name} has values that are not finite numbers"),
        ({**held, name: held[name].astype(np.int32)}, "has type int32, not floating-point numbers"),
        ({**held, name.replace(".weight", ".default.weight"): held[name]}, "are both for"),
        ({**held, whole: kernel}, f"{name} and {whole} are both for|{whole} and {name} are both for"),
    ):
        save_file(tensors, folder / peft.WEIGHTS)
        with pytest.raises(UserError, match=message):
            loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)


def test_an_adapter_that_leads_back_to_itself_is_refused(tmp_path):
    base = RECORDED / "untied"
    model, params = trained(base, Adapter(2, 3.0, TARGETS))
    one, two = (written(tmp_path / name, base, model, params) for name in ("one", "two"))
    assert peft_config.base_of(one) == base
    peft_config.rename_base(one, str(two))
    assert peft_config.base_of(one) == two and peft_config.described_by(one) == base
    for base_of_two in (one, two):
        peft_config.rename_base(two, str(base_of_two))
        with pytest.raises(UserError, match=r"leads back to .*, which has no weights but adapters: name a whole model"):
            loading.open_model(one)


def test_the_base_of_a_hub_has_its_revision_apart(tmp_path):
    """PEFT loads repository and revision from two keys; here they are one path."""
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    peft_config.rename_base(folder, "org/name@main")
    settings = json.loads((folder / peft_config.CONFIG).read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", "main")
    assert peft_config.read_settings(folder).base == "org/name@main"
    peft_config.rename_base(folder, str(base))
    assert peft_config.read_settings(folder).base == str(base)


def test_a_tied_embedding_is_replaced_only_with_its_head(tmp_path):
    """PEFT leaves the head of a tied model as it was, unless ensure_weight_tying; then it stores both."""
    base = RECORDED / "tied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    held = load_file(folder / peft.WEIGHTS)
    embedding, head = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
    moved = loading.open_model(base).tensors.read(embedding.removeprefix(peft.PREFIX)) + 1
    settings = json.loads((folder / peft_config.CONFIG).read_text())
    for name in (embedding, head):
        save_file({**held, name: moved}, folder / peft.WEIGHTS)
        with pytest.raises(UserError, match="embedding and head are one tensor, and in PEFT one of them stays"):
            loading.open_model(folder)
    (folder / peft_config.CONFIG).write_text(json.dumps(settings | {"ensure_weight_tying": True}))
    save_file({**held, embedding: moved, head: moved}, folder / peft.WEIGHTS)
    found = loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)[1]["frozen"]
    assert np.array_equal(found["embedding"], moved)
    save_file({**held, embedding: moved, head: moved + 1}, folder / peft.WEIGHTS)
    with pytest.raises(UserError, match="they differ: the file is damaged"):
        loading.open_model(folder)


def test_adapters_are_those_of_the_modules_that_the_settings_name(tmp_path):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    held, settings = load_file(folder / peft.WEIGHTS), json.loads((folder / peft_config.CONFIG).read_text())
    of_one_layer = {name: tensor for name, tensor in held.items() if ".layers.0." in name}
    assert 0 < len(of_one_layer) < len(held)
    save_file(of_one_layer, folder / peft.WEIGHTS)
    with pytest.raises(UserError, match=r"has no adapters of model\.layers\.1\..*, but .* names it in target_modules"):
        loading.open_model(folder)
    (folder / peft_config.CONFIG).write_text(json.dumps(settings | {"layers_to_transform": [0]}))
    assert loading.open_model(folder).head == "lm"
    save_file(held, folder / peft.WEIGHTS)
    (folder / peft_config.CONFIG).write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match=r"has adapters of model\.layers\..*, but .* does not name it in"):
        loading.open_model(folder)


def test_adapters_of_another_model_are_refused(tmp_path):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    held = load_file(folder / peft.WEIGHTS)
    name = next(name for name in held if name.endswith("q_proj.lora_B.weight"))

    def change(tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / peft.WEIGHTS)

    change({**held, name: np.concatenate([held[name]] * 2)})
    with pytest.raises(UserError, match="belongs to another model"):
        loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)
    change({**held, "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight": held[name]})
    with pytest.raises(UserError, match=r"layers\.99.* is for no tensor"):
        loading.open_model(folder)
    embedding = "base_model.model.model.embed_tokens.lora_A.weight"
    change({**held, embedding: held[name]})
    with pytest.raises(UserError, match=rf"{embedding} is for no tensor"):
        loading.open_model(folder)
    change({other: tensor for other, tensor in held.items() if other != name})
    with pytest.raises(UserError, match="lora_A alone"):
        loading.open_model(folder)
    change({**held, name: held[name][:, :1]})
    with pytest.raises(UserError, match="do not multiply"):
        loading.open_model(folder)
    (folder / peft.WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="broken safetensors"):
        loading.open_model(folder)
    (folder / peft.WEIGHTS).unlink()
    (folder / "adapter_model.bin").touch()
    with pytest.raises(UserError, match="pickled and is not read"):
        loading.open_model(folder)


def test_kernels_that_are_one_matrix_are_adapted_together():
    mesh, base = mesh_of(1, 1, 1), RECORDED / "gpt_neox"
    model, params = loading.load(base, Options(), mesh, frozen=True)
    for targets, message in [
        (("q_proj", "o_proj"), "q_proj, k_proj, v_proj are one matrix in a gpt_neox model"),
        (("gate_proj",), "gate_proj, but the layers of a gpt_neox model have none"),
    ]:
        with pytest.raises(UserError, match=message):
            loading.adapt(model, params, AdapterConfig(targets=targets), mesh, jax.random.key(0))
    adapted = loading.make_adapter(AdapterConfig(), model.decoder)
    assert adapted.targets == ("q", "k", "v", "o", "up", "down")


def test_other_alphas_and_ranks_are_read_by_module(tmp_path):
    base = RECORDED / "untied"
    model, params = trained(base, Adapter(2, 3.0, TARGETS))
    folder = written(tmp_path / "adapter", base, model, params)
    settings = json.loads((folder / peft_config.CONFIG).read_text())
    # PEFT runs the names as regular expressions, in which a dot is any character
    changed = settings | {"alpha_pattern": {"self_attn.q.proj": 9.0}, "lora_alpha": 1}
    (folder / peft_config.CONFIG).write_text(json.dumps(changed))
    _, found = loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)
    for kernel, alpha in (("q", 9.0), ("o", 1.0)):
        wanted = adapter.folded(merge(params), Adapter(2, alpha, TARGETS), "float32")["layers"]["attention"][kernel]
        assert np.allclose(wanted, found["frozen"]["layers"]["attention"][kernel], rtol=1e-6, atol=1e-6)
    (folder / peft_config.CONFIG).write_text(json.dumps(changed | {"r": 64}))
    with pytest.raises(UserError, match=r"have rank 2, but adapter_config\.json says 64 \(r, rank_pattern\)"):
        loading.open_model(folder)
    ranks = {name: 2 for name in ("q_proj", "self_attn.o_proj", "down_proj")}
    (folder / peft_config.CONFIG).write_text(json.dumps(changed | {"r": 64, "rank_pattern": ranks}))
    _, again = loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again))


def test_the_tokenizer_is_the_base_s_where_there_is_none(tmp_path):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    assert (
        peft_config.is_adapter(folder) and not peft_config.is_adapter(base) and peft_config.described_by(folder) == base
    )
    shutil.copy(base / "config.json", folder)
    assert peft_config.is_adapter(folder), "trainers write config.json beside adapters"
    shutil.copy(base / "model.safetensors.index.json", folder)
    with pytest.raises(UserError, match=r"holds a model, model\.safetensors\.index\.json, and adapters of another"):
        loading.open_model(folder)


def test_a_base_in_the_user_s_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"peft_type": "LORA", "base_model_name_or_path": "~/base", "lora_alpha": 1, "r": 1, "target_modules": []}
    (tmp_path / peft_config.CONFIG).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"base_model_name_or_path=~/base: no such folder or file"):
        peft_config.base_of(tmp_path)
    (tmp_path / "base").mkdir()
    assert peft_config.read_settings(tmp_path).base == "~/base"
    assert peft_config.base_of(tmp_path) == tmp_path / "base"
