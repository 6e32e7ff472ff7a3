"""`mpo export`: every kind of source, written whole or not at all."""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

from mpo_jax.config.schema import OptimConfig
from mpo_jax.data import toy
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.stages.ppo.iteration import PpoState
from mpo_jax.tools import export
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import init_state
from mpo_jax.types import trainable
from tests.cli.conftest import damaged
from tests.models.tiny import mesh_of, random_params
from tests.pipeline.test_pipeline import mpo

NO_CACHE = "runtime.compilation_cache=null"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", ["language_model", "reward_model"])
def test_a_folder_goes_through_unchanged(request, name, tmp_path, capsys):
    folder = request.getfixturevalue(name)
    assert mpo("export", str(folder), str(tmp_path / "out"), NO_CACHE) == 0
    same_tensors(tensors(tmp_path / "out"), tensors(folder))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    kind = "reward model" if name == "reward_model" else "language model"
    assert kind in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == toy.make_tokenizer().get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "It was not trained there" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type(language_model, tmp_path, dtype, capsys):
    assert mpo("export", str(language_model), str(tmp_path / "out"), "--dtype", dtype, NO_CACHE) == 0
    whole, half = tensors(language_model), tensors(tmp_path / "out")
    for name in whole:
        np.testing.assert_array_equal(half[name], whole[name].astype(half[name].dtype))
        assert str(half[name].dtype) == dtype
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype).removeprefix("torch.") == dtype
    # without the option, a model keeps the type in which it is stored
    assert mpo("export", str(tmp_path / "out"), str(tmp_path / "again"), NO_CACHE) == 0
    same_tensors(tensors(tmp_path / "again"), half)
    assert f" in {dtype}, " in capsys.readouterr().out


@pytest.fixture
def unfinished(tmp_path, decoder):
    """What a killed stage leaves: descriptions of its models, and a checkpoint. PPO's, and SFT's beside it."""
    mesh, tokenizer, optimizer = mesh_of(1, 1, 1), toy.make_tokenizer(), make_optimizer(OptimConfig())
    actor, critic = trainable(random_params(decoder, 5)), trainable(random_params(decoder, 6, head="value"))
    both = (init_state(params, optimizer, mesh) for params in (actor, critic))
    states = {
        "ppo": PpoState(*both, kl_coef=jax.numpy.zeros(()), ema=None),
        "sft": init_state(actor, optimizer, mesh),
    }
    for stage, state in states.items():
        folder = tmp_path / f".{stage}-abc.partial"
        loading.save_description(folder / "model", Model(decoder), tokenizer)
        if stage == "ppo":
            loading.save_description(folder / "critic", Model(decoder), tokenizer, head="value")
        checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        checkpoints.save(3, jax.tree.map(jax.numpy.zeros_like, state))
        checkpoints.save(7, state)
        checkpoints.close()
    return tmp_path, actor, critic


def test_the_newest_checkpoint_of_an_unfinished_stage(unfinished, decoder, tmp_path, capsys):
    folder, actor, critic = unfinished
    for stage, flags, params in (("sft", (), actor), ("ppo", (), actor), ("ppo", ("--critic",), critic)):
        out, wanted = (tmp_path / f"{name}-{stage}-{len(flags)}" for name in ("out", "wanted"))
        assert mpo("export", str(folder / f".{stage}-abc.partial"), str(out), *flags, NO_CACHE) == 0
        assert f"step 7 of the unfinished .{stage}-abc.partial" in capsys.readouterr().out
        loading.save(wanted, Model(decoder), params, toy.make_tokenizer())
        same_tensors(tensors(out), tensors(wanted))


def test_mistakes(language_model, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    for arguments, says in (
        ((language_model, full), "exists and is not empty"),
        ((language_model, tmp_path / "out", "--critic"), "holds no critic"),
        ((tmp_path / "nowhere", tmp_path / "out"), "no such folder"),
    ):
        assert mpo("export", *map(str, arguments), NO_CACHE) == 2
        assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and (full / "mine.txt").read_text() == "keep me"


def test_an_exported_folder_is_for_all_readers(language_model, tmp_path):
    """Its files have the umask's mode, and its tokenizer a class that transformers 4.57 knows."""
    previous = os.umask(0o027)
    try:
        assert mpo("export", str(language_model), str(tmp_path / "out"), NO_CACHE) == 0
    finally:
        os.umask(previous)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == dict.fromkeys(
        (file.name for file in (tmp_path / "out").iterdir()), 0o640
    )
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(("value", "says"), [(np.nan, "holds NaN or infinity"), (1e6, "beyond float16's 65504")])
def test_what_is_no_model_in_that_type_leaves_no_folder(language_model, tmp_path, value, says, capsys):
    folder = damaged(language_model, tmp_path / "damaged", value)
    assert mpo("export", str(folder), str(tmp_path / "out"), "--dtype", "float16", NO_CACHE) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert says in said and "model.norm.weight" in said
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_disk_that_takes_no_more_is_said(language_model, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_card", full)
    assert mpo("export", str(language_model), str(tmp_path / "out"), NO_CACHE) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"cannot write {tmp_path / 'out'}: No space left on device" in said and "free space" in said
    assert not list(tmp_path.iterdir())
