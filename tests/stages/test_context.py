"""What a stage is given: inputs that it has declared and no others, and the model that everything starts from."""

import jax
import numpy as np
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import ArchitectureConfig, Config, TextConfig
from mpo_jax.data import toy
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.pipeline.stages import STAGES, stage_context
from mpo_jax.stages.context import INPUTS, Context, Inputs
from mpo_jax.stages.settings import Numerics
from tests.models.tiny import RECORDED, mesh_of
from tests.pipeline.test_pipeline import MICRO

READERS = {
    "data": ("corpus", "utility", "samples_once", "is_toy"),
    "base": ("base", "tokenizer"),
    "reward_model": ("reward_model",),
    "reward_function": ("reward_function",),
}
"""What can be read of each input."""
BASE, REWARD = str(RECORDED / "tied"), str(RECORDED / "llama_score")


def micro(*overrides: str) -> Config:
    return load_config(MICRO, overrides)


def test_the_readers_are_all_that_inputs_have():
    public = {name for name in vars(Inputs) if not name.startswith("_")}
    assert public == {"only", "fingerprints"} | {name for names in READERS.values() for name in names}
    assert READERS.keys() == INPUTS


@pytest.mark.parametrize("declared", [(), ("data",), ("base",), ("reward_model",), ("data", "base")])
def test_what_is_not_declared_is_refused(declared):
    inputs = Inputs(micro()).only(declared)
    for name, readers in READERS.items():
        for reader in readers:
            if name in declared:
                getattr(inputs, reader)
            else:
                with pytest.raises(AssertionError, match=f"the stage reads {name}, which its name does not hash"):
                    getattr(inputs, reader)


def test_a_fingerprint_for_each_declared_input_that_there_is():
    whole = Inputs(micro(f"model.path={BASE}", f"reward.path={REWARD}"))
    assert whole.fingerprints.keys() == INPUTS - {"reward_function"} and len(set(whole.fingerprints.values())) == 3
    function = Inputs(micro("reward.function=json:dumps")).fingerprints
    assert function.keys() == {"data", "reward_function"} and len(set(function.values())) == 2
    for declared in ((), ("data",), ("base", "reward_model")):
        assert whole.only(declared).fingerprints == {name: whole.fingerprints[name] for name in declared}
    # a model from scratch and a reward model that is trained are no files
    assert Inputs(micro()).fingerprints.keys() == {"data"}
    assert Inputs(micro()).fingerprints["data"] == whole.fingerprints["data"]


def test_a_function_that_changes_while_a_command_runs_is_refused(tmp_path, monkeypatch):
    """Stages are named after the file as it was; what was imported may be either."""
    module = tmp_path / "changing_rewards.py"
    module.write_text("def f(prompts, responses):\n    return [0.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    inputs = Inputs(micro("reward.function=changing_rewards:f"))
    assert inputs.fingerprints and inputs.reward_function is not None
    module.write_text(module.read_text() + "# changed\n")
    later = Inputs(micro("reward.function=changing_rewards:f"))
    with pytest.raises(UserError, match=r"changing_rewards:f: its file has changed since this command began"):
        _ = later.reward_function


def test_inputs_know_nothing_of_other_sections():
    """Not the seed, for one: what is read under another seed is the same, and shared."""
    one, other = Inputs(micro()), Inputs(micro("seed=5", "workdir=elsewhere"))
    assert one.fingerprints == other.fingerprints and one.corpus is other.corpus


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_s_context_gives_what_its_stage_declares(name, tmp_path):
    config, stage = micro(), STAGES[name]
    recipe = {"stage": name}
    context = stage_context(config, stage, mesh_of(1, 1, 1), tmp_path, Inputs(config), recipe)
    for undeclared in INPUTS - stage.inputs:
        for reader in READERS[undeclared]:
            with pytest.raises(AssertionError, match=r"declare it in Stage\.inputs"):
                getattr(context.inputs, reader)


# ---- the base model ------------------------------------------------------------------------------------------------


def context_of(config: Config, mesh: jax.sharding.Mesh, folder) -> Context:
    return Context(mesh, folder, Inputs(config))


def toy_codec(text: TextConfig) -> TextCodec:
    return TextCodec(toy.make_tokenizer(), text)


@pytest.mark.thorough
def test_a_base_model_from_scratch_is_padded_sharded_and_drawn_from_the_seed(tmp_path):
    """The drawn numbers do not depend on the mesh."""
    config = micro()
    codec, numerics, sizes = toy_codec(config.text), Numerics.of(config.model), config.model.architecture

    def embedding(mesh, seed):
        model, params = context_of(config, mesh, tmp_path).load_base("sft", numerics, codec, sizes, seed)
        assert params["frozen"] == {} and model.decoder.vocab_size == len(params["trainable"]["embedding"])
        return params["trainable"]["embedding"]

    one = embedding(mesh_of(1, 1, 1), 3)
    assert len(one) % 8 == 0 and 0 <= len(one) - codec.vocab_size < 8
    sharded = embedding(mesh_of(2, 2, 2), 3)
    assert not sharded.sharding.is_fully_replicated
    np.testing.assert_allclose(sharded, one, rtol=1e-6, atol=1e-8)
    assert not np.array_equal(one, embedding(mesh_of(1, 1, 1), 4))


def test_a_base_model_must_have_the_positions(tmp_path):
    config = micro("text.max_prompt_tokens=60")
    context, numerics = context_of(config, mesh_of(1, 1, 1), tmp_path), Numerics.of(config.model)
    with pytest.raises(UserError, match=r"60.*positions"):
        context.load_base("sft", numerics, toy_codec(config.text), config.model.architecture, 0)


def test_a_base_model_with_the_tokenizer_of_another_is_refused(tmp_path):
    """The toy world has more words than the recorded model has rows."""
    config = micro(f"model.path={BASE}")
    context, codec = context_of(config, mesh_of(1, 1, 1), tmp_path), toy_codec(config.text)
    with pytest.raises(UserError, match=rf"tied: the tokenizer has {codec.vocab_size} ids"):
        context.load_base("sft", Numerics.of(config.model), codec, None, 0)


def test_a_base_model_whose_heads_do_not_group_is_refused(tmp_path):
    sizes = ArchitectureConfig(num_heads=4, num_kv_heads=3)
    context = context_of(micro(), mesh_of(1, 1, 1), tmp_path)
    with pytest.raises(UserError, match=r"num_heads=4 is no multiple of num_kv_heads=3"):
        context.load_base("sft", Numerics.of(micro().model), toy_codec(micro().text), sizes, 0)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_trains_keeps_its_configuration_beside_its_checkpoints(name, tmp_path):
    """What `mpo verify`, `mpo export` and model cards read, before anything is trained."""
    config = micro("seed=7", f"workdir={tmp_path}")
    recipe = {"format": 5, "stage": name, "settings": {}, "inputs": {}, "parents": {}}
    stage_context(config, STAGES[name], mesh_of(1, 1, 1), tmp_path / "made", Inputs(config), recipe)
    written = tmp_path / "made" / "config.yaml"
    assert written.is_file() == STAGES[name].trains
    assert not STAGES[name].trains or load_config(written) == config
