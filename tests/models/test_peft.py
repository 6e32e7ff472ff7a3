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
from mpo_jax.models.hf import peft
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
    peft.save_settings(folder, model.adapter, model.decoder, base=str(base), head=head)
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
    settings = json.loads((folder / peft.CONFIG).read_text())
    assert settings["target_modules"] == ["q_proj", "o_proj"] and settings["r"] == 2 and settings["lora_alpha"] == 4


def test_a_reward_model_s_head_is_saved_whole(tmp_path):
    base = RECORDED / "llama_score"
    model, params = trained(base, Adapter(2, 3.0, TARGETS), "value")
    folder = written(tmp_path / "adapter", base, model, params, "value")
    source = loading.open_model(folder)
    assert source.head == "value"
    _, found = loading.load(folder, Options(), mesh_of(1, 1, 1), head="value", frozen=True)
    assert np.array_equal(found["frozen"]["score"]["kernel"], params["trainable"]["score"]["kernel"])
    assert json.loads((folder / peft.CONFIG).read_text())["modules_to_save"] == ["score"]


BROKEN = {
    "peft_type": ("IA3", "only LORA is"),
    "use_dora": (True, "use_dora"),
    "alpha_pattern": ({"q_.*": 3}, "alpha_pattern"),
    "init_lora_weights": ("pissa", "init_lora_weights"),
    "layer_replication": ([[0, 2]], "layer_replication"),
    "bias": ("all", "bias"),
    "lora_alpha": ("much", "not a number"),
    "base_model_name_or_path": (None, "base_model_name_or_path is missing"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_other_methods_are_refused_by_key(tmp_path, key):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    value, message = BROKEN[key]
    settings = json.loads((folder / peft.CONFIG).read_text()) | {key: value}
    (folder / peft.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as raised:
        loading.open_model(folder)
    assert str(folder / peft.CONFIG) in str(raised.value)


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
    settings = json.loads((folder / peft.CONFIG).read_text())
    changed = settings | {"alpha_pattern": {"self_attn.q_proj": 9.0}, "lora_alpha": 1, "r": 64}
    (folder / peft.CONFIG).write_text(json.dumps(changed))
    _, found = loading.load(folder, Options(), mesh_of(1, 1, 1), frozen=True)
    for kernel, alpha in (("q", 9.0), ("o", 1.0)):
        wanted = adapter.folded(merge(params), Adapter(2, alpha, TARGETS), "float32")["layers"]["attention"][kernel]
        assert np.allclose(wanted, found["frozen"]["layers"]["attention"][kernel], rtol=1e-6, atol=1e-6)


def test_the_tokenizer_is_the_base_s_where_there_is_none(tmp_path):
    base = RECORDED / "untied"
    folder = written(tmp_path / "adapter", base, *trained(base, Adapter(2, 3.0, TARGETS)))
    assert peft.is_adapter(folder) and not peft.is_adapter(base) and peft.described_by(folder) == base
    shutil.copy(base / "config.json", folder)
    assert peft.is_adapter(folder), "trainers write config.json beside adapters"
    shutil.copy(base / "model.safetensors.index.json", folder)
    with pytest.raises(UserError, match=r"holds a model, model\.safetensors\.index\.json, and adapters of another"):
        loading.open_model(folder)


def test_a_base_in_the_user_s_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"peft_type": "LORA", "base_model_name_or_path": "~/base", "lora_alpha": 1, "r": 1, "target_modules": []}
    (tmp_path / peft.CONFIG).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"base_model_name_or_path=~/base: no such folder or file"):
        peft.read_settings(tmp_path)
    (tmp_path / "base").mkdir()
    assert peft.read_settings(tmp_path).base == "~/base"
