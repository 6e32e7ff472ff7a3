"""mpo_jax.models.hf.ends: a model's end tokens, from its folder to where sampling stops, and into a saved folder."""

import json
import shutil

import numpy as np
import pytest

from mpo_jax.config.schema import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.base_model import fingerprint_base, fingerprint_model
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.ends import end_ids, read_end_ids
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.types import trainable
from tests.cli.conftest import decoder, language_model  # noqa: F401 (fixtures)
from tests.models.tiny import random_params

EOS = int(toy.make_tokenizer().eos_token_id)  # type: ignore[arg-type]
PAD, BOSS = 0, int(toy.make_tokenizer()(" boss").input_ids[0])


@pytest.fixture
def listing(language_model, tmp_path):  # noqa: F811
    """A copy of the model with these values of eos_token_id in its files; None: no such file."""

    def listing(generation, config=None):
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(language_model, folder)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        if config is not None:
            values = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
            (folder / "config.json").write_text(json.dumps(values))
        return folder

    return listing


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, [EOS]),
        ([EOS], None, [EOS]),
        (EOS, None, [EOS]),
        ([PAD, EOS, PAD], None, [EOS, PAD]),
        ([PAD], None, [EOS, PAD]),
        (PAD, None, [EOS, PAD]),
        # generation_config.json comes before config.json, whose single id may be an architecture's default
        ([EOS], [EOS, PAD], [EOS]),
        (None, [EOS, PAD], [EOS, PAD]),
        (None, PAD, [EOS]),
    ],
)
def test_which_tokens_end_a_response(generation, config, expected, listing):
    codec = TextCodec(load_tokenizer(listing(generation, config)), TextConfig())
    assert list(codec.end_ids) == expected and codec.eos_id == EOS
    assert codec.ends == (EOS if len(expected) == 1 else tuple(expected))


@pytest.mark.parametrize("value", ["</s>", [1.5], [True], [-1], {"a": 1}])
def test_what_is_no_id_is_refused(value, listing):
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.* must be a token's id, or a list"):
        load_tokenizer(listing(value))


def test_an_id_that_the_tokenizer_lacks_is_refused(listing):
    for id_ in (99999, 2**31, 10**30):
        with pytest.raises(UserError, match=rf"eos_token_id={id_}, but the tokenizer has no such id"):
            load_tokenizer(listing([EOS, id_]))


def test_a_broken_file_is_refused(listing):
    folder = listing([EOS])
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: broken JSON"):
        load_tokenizer(folder)


def test_ends_may_be_sampled_and_cut_the_text(listing):
    codec = TextCodec(load_tokenizer(listing([EOS, PAD, BOSS])), TextConfig())
    one = TextCodec(toy.make_tokenizer(), TextConfig())
    allowed, before = codec.allowed(codec.vocab_size), one.allowed(codec.vocab_size)
    assert allowed[PAD] and not before[PAD] and np.flatnonzero(allowed != before).tolist() == [PAD]
    ids = [int(i) for i in codec.tokenizer(" my keys").input_ids]
    assert codec.decode([*ids, BOSS, *ids, EOS]) == codec.decode([*ids, PAD, EOS]) == codec.decode(ids)
    # data end with EOS alone
    assert codec.response(" my keys").ids == [*ids, EOS]


def test_saved_models_keep_their_ends(listing, decoder, tmp_path):  # noqa: F811
    tokenizer, model, params = load_tokenizer(listing([EOS, PAD])), Model(decoder), trainable(random_params(decoder))
    loading.save(tmp_path / "several", model, params, tokenizer)
    assert read_end_ids(tmp_path / "several") == [EOS, PAD]
    assert end_ids(load_tokenizer(tmp_path / "several")) == (EOS, PAD)
    loading.save(tmp_path / "one", model, params, toy.make_tokenizer())
    assert not (tmp_path / "one" / "generation_config.json").exists()
    assert json.loads((tmp_path / "one" / "config.json").read_text())["eos_token_id"] == EOS


def test_a_base_model_of_several_ends_has_another_name(listing):
    """Earlier versions stopped at one of them; of a model with one end the name stays what it was."""
    local_model.cache_clear()
    one, several = str(listing([EOS])), str(listing([EOS, PAD]))
    assert fingerprint_base(one) == fingerprint_model(one)
    assert fingerprint_base(several) != fingerprint_model(several)


@pytest.mark.parametrize(
    ("generation", "config", "contradict"),
    [
        ([PAD], EOS, True),
        (PAD, [EOS, BOSS], True),
        ([EOS, PAD], EOS, False),
        (EOS, [EOS, PAD], False),
        (EOS, EOS, False),
    ],
)
def test_files_that_contradict_each_other_are_named_once(generation, config, contradict, listing, capsys):
    folder = listing(generation, config)
    for _ in range(2):
        load_tokenizer(folder)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"{folder}: generation_config.json has eos_token_id={generation} and config.json") == contradict
    assert said.count("responses end as generation_config.json says") == contradict
