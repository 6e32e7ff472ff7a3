"""Python code that a model's folder brings is never run, and nobody is asked whether to run it."""

import io
import json
import shutil
import sys

import pytest

from mpo_jax.config.schema import Config, ModelConfig, RewardConfig, TextConfig
from mpo_jax.data.sources import open_source
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.pipeline.stages import stage_settings
from mpo_jax.stages import reward
from mpo_jax.stages.context import Context, Inputs
from tests.cli.conftest import decoder, language_model, reward_model  # noqa: F401 (fixtures)
from tests.models.tiny import mesh_of
from tests.pipeline.test_pipeline import mpo

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).write_text("the folder's code ran")
class Planted(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Gives a model's folder code of its own. Whoever asks on standard input hears yes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))

    def plant(model, *, standard=None):
        folder = tmp_path / "planted"
        shutil.copytree(model, folder)
        (folder / "planted.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
        auto_map = {"AutoTokenizer": [None, "planted.Planted"], "AutoConfig": "planted.Planted"}
        for name, update in (
            ("tokenizer_config.json", {"tokenizer_class": standard or "Planted", "auto_map": auto_map}),
            ("config.json", {"auto_map": auto_map}),
        ):
            values = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(values | update))
        return folder

    yield plant
    assert not (tmp_path / "marker").exists()
    assert sys.stdin.read() == "y\n" * 10, "standard input was read"


SAYS = "its tokenizer is Python code (auto_map in tokenizer_config.json), which is never run here"


def unknown_type(folder):
    """Of a kind that transformers has no tokenizer for, so that only the folder's code would do."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "planted"}))
    return folder


def test_a_tokenizer_that_is_code_is_refused(planted, language_model):  # noqa: F811
    with pytest.raises(UserError) as caught:
        load_tokenizer(unknown_type(planted(language_model)))
    assert SAYS in str(caught.value) and "trust_remote_code" not in str(caught.value)


def test_a_standard_tokenizer_is_loaded_without_the_code_beside_it(planted, language_model):  # noqa: F811
    expected = load_tokenizer(language_model)
    found = load_tokenizer(planted(language_model, standard="PreTrainedTokenizerFast"))
    assert type(found).__module__.startswith("transformers.")
    assert found.get_vocab() == expected.get_vocab()


def test_generate_does_not_feed_its_prompt_to_a_question(planted, language_model, capsys):  # noqa: F811
    folder = planted(language_model)
    (folder / "config.json").write_text((language_model / "config.json").read_text())
    code = mpo("generate", str(folder), "should i quit", "--max-new-tokens", "1", "runtime.compilation_cache=null")
    assert code == 0 or SAYS in capsys.readouterr().err


def test_a_reward_model_s_code_is_not_run(planted, reward_model, language_model, tmp_path):  # noqa: F811
    folder = planted(reward_model)
    config = Config(
        reward=RewardConfig(path=str(folder)),
        model=ModelConfig(path=str(language_model)),
        text=TextConfig(max_prompt_tokens=8, max_response_tokens=8),
    )
    codec = TextCodec(load_tokenizer(language_model), config.text)
    context = Context(mesh_of(1, 1, 1), tmp_path, Inputs(config))
    try:
        reward._finished(str(folder), stage_settings("reward", config), context, codec)
    except UserError as error:
        assert SAYS in str(error)


def test_pickled_rows_are_not_read():
    with pytest.raises(UserError, match="pickled files, which can run code"):
        open_source("hub:pandas:some/folder")
