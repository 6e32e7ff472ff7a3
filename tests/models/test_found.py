"""mpo_jax.models.hf.found: heads and embeddings under other names, several labels, rows that a tokenizer needs."""

import json
import shutil
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.config.schema import ModelConfig, TextConfig
from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.hf import weights
from mpo_jax.models.hf.found import SCORE
from mpo_jax.models.hf.safetensors_folder import SafetensorsFolder
from mpo_jax.types import merge
from tests.models.tiny import RECORDED, answers, close, load_folder, mesh_of, recorded_tokens

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

SHORT = TextConfig(max_prompt_tokens=8, max_response_tokens=8)
OPTIONS = loading.Options.of(ModelConfig())


NEOX = ("gpt_neox.embed_in.weight", "embed_out.weight")
"""A family that has names of its own for both."""


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1, 1)


@pytest.fixture
def change(tmp_path):
    """A copy of a recorded model with other tensors and keys of config.json."""

    def change(name, tensors, **keys):
        folder = tmp_path / name
        shutil.copytree(RECORDED / name, folder)
        held = load_file(folder / "model.safetensors") | tensors(load_file(folder / "model.safetensors"))
        held = {key: value for key, value in held.items() if value is not None}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def tree_of(folder, mesh, **options) -> dict[str, Any]:
    return merge(loading.load(folder, OPTIONS, mesh, **options)[1])


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


# tied weights


def test_tied_weights_under_the_heads_name_alone(change, mesh, capsys):
    folder = change("tied", lambda held: {EMBEDDING: None, HEAD: held[EMBEDDING]})
    config, expected = load_folder(RECORDED / "tied", mesh)
    found = loading.open_model(folder)
    loading.check_source(found, config.vocab_size, SHORT, head="lm")
    assert found.tensors.dtype == SafetensorsFolder(RECORDED / "tied").dtype
    tree = tree_of(folder, mesh)
    np.testing.assert_array_equal(tree["embedding"], expected["embedding"])
    tokens = recorded_tokens(config)
    close(answers(config, tree, tokens), answers(config, expected, tokens), rtol=0, atol=0)
    assert f"the embedding is read from {HEAD}, to which it is tied" in said(capsys)


def test_a_family_with_other_names_is_tied_by_them(change, mesh, capsys):
    embedding, head = NEOX
    folder = change("gpt_neox", lambda held: {embedding: None, head: held[embedding]}, tie_word_embeddings=True)
    expected = load_file(RECORDED / "gpt_neox" / "model.safetensors")[embedding]
    np.testing.assert_array_equal(tree_of(folder, mesh)["embedding"], expected)
    assert f"the embedding is read from {head}, to which it is tied" in said(capsys)


def test_a_tied_copy_of_the_embedding_is_taken_if_it_is_one(change, mesh, capsys):
    folder = change("tied", lambda held: {HEAD: held[EMBEDDING].copy()})
    assert tree_of(folder, mesh).keys() == load_folder(RECORDED / "tied", mesh)[1].keys()
    assert said(capsys) == ""


def test_a_tied_head_of_other_values_is_an_error_that_names_both(change, mesh):
    folder = change("tied", lambda held: {HEAD: held[EMBEDDING] + 1})
    with pytest.raises(UserError, match=rf"{EMBEDDING} and {HEAD} differ: set tie_word_embeddings to false"):
        tree_of(folder, mesh)


# reward models


def rng():
    return np.random.default_rng(3)


def heads(number):
    return lambda held: {SCORE: rng().normal(size=(number, held[SCORE].shape[1])).astype(np.float32)}


def score(folder, mesh, **options):
    return np.asarray(tree_of(folder, mesh, head="value", **options)["score"]["kernel"])[:, 0]


def test_of_two_labels_the_difference(change, mesh, capsys):
    folder = change("llama_score", heads(2), id2label={"0": "rejected", "1": "chosen"})
    assert loading.open_model(folder).head == "value"
    w = load_file(folder / "model.safetensors")[SCORE]
    np.testing.assert_array_equal(score(folder, mesh), w[1] - w[0])
    assert "the score is the logit of chosen less that of rejected (reward.label can name one)" in said(capsys)


@pytest.mark.parametrize(("label", "row"), [("bad", 0), ("good", 2), ("1", 1)])
def test_the_label_that_is_named(label, row, change, mesh, capsys):
    names = ["bad", "fair", "good"]
    folder = change("llama_score", heads(3), id2label={str(i): name for i, name in enumerate(names)})
    np.testing.assert_array_equal(score(folder, mesh, label=label), load_file(folder / "model.safetensors")[SCORE][row])
    assert f"the score is the logit of {names[row]}, one of 3 labels" in said(capsys)


def test_an_open_label_is_an_error(change, mesh):
    folder = change("llama_score", heads(3), id2label={"0": "bad", "1": "fair", "2": "good"})
    message = r"a classifier of 3 labels .* reward\.label: bad, fair, good"
    with pytest.raises(UserError, match=message):
        score(folder, mesh)
    with pytest.raises(UserError, match=message):
        loading.check_source(loading.open_model(folder), 40, SHORT, head="value")
    with pytest.raises(UserError, match=r"reward\.label=best is none of the head's labels: bad, fair, good"):
        score(folder, mesh, label="best")


def test_weights_are_floating_point_numbers(change, mesh):
    def whole_numbers(held):
        return held | {SCORE: held[SCORE].astype(np.int32)}

    folder = change("llama_score", whole_numbers)
    with pytest.raises(UserError, match=r"tensor score\.weight has type I32, not floating-point numbers"):
        score(folder, mesh)


def test_labels_without_names_have_numbers(change, mesh, capsys):
    folder = change("llama_score", heads(2), id2label=None)
    score(folder, mesh)
    assert "the logit of LABEL_1 less that of LABEL_0" in said(capsys)


def test_one_label_is_read_as_it_is_and_nothing_is_said(mesh, capsys):
    expected = load_file(RECORDED / "llama_score" / "model.safetensors")[SCORE][0]
    np.testing.assert_array_equal(score(RECORDED / "llama_score", mesh), expected)
    assert said(capsys) == ""


@pytest.mark.parametrize("name", ["v_head.summary", "v_head", "value_head.summary", "value_head"])
def test_value_heads_of_other_libraries(name, change, mesh, capsys):
    """A language model's head beside them, as TRL leaves it, is not read."""

    def tensors(held):
        head = {f"{name}.weight": held[SCORE], f"{name}.bias": np.asarray([0.5], np.float32)}
        return {SCORE: None, HEAD: held[EMBEDDING] + 1, **head}

    folder = change("llama_score", tensors)
    found = loading.open_model(folder)
    assert found.head == "value"
    loading.check_source(found, found.decoder.vocab_size, SHORT, head="value")
    expected = load_file(RECORDED / "llama_score" / "model.safetensors")[SCORE][0]
    np.testing.assert_array_equal(score(folder, mesh), expected)
    text = said(capsys)
    assert f"the score's head is {name}.weight" in text
    assert f"{name}.bias=[0.5] is left out: it moves all scores alike" in text


def test_a_bias_of_zero_needs_no_word(change, mesh, capsys):
    bias = np.zeros(1, np.float32)
    score(change("llama_score", lambda held: {SCORE: None, "v_head.weight": held[SCORE], "v_head.bias": bias}), mesh)
    assert "left out" not in said(capsys)


def test_several_heads_are_an_error_that_names_them(change):
    folder = change("llama_score", lambda held: {"v_head.weight": held[SCORE]})
    with pytest.raises(UserError, match=r"several heads for scores: score\.weight, v_head\.weight"):
        loading.open_model(folder)


# rows for a few ids


@pytest.mark.parametrize(("name", "embedding", "head"), [("untied", EMBEDDING, HEAD), ("gpt_neox", *NEOX)])
def test_rows_for_a_few_ids_are_the_mean_of_the_others(mesh, capsys, name, embedding, head):
    files = sorted((RECORDED / name).glob("*.safetensors"))
    stored = {name: value for file in files for name, value in load_file(file).items()}
    ids = len(stored[embedding]) + 1
    model, params = loading.load(RECORDED / name, OPTIONS, mesh, num_ids=ids)
    tree, rows = merge(params), -(-ids // 8) * 8
    assert model.decoder.vocab_size == rows == len(tree["embedding"]) == tree["head"].shape[1]
    for found, name in ((tree["embedding"], embedding), (tree["head"].T, head)):
        np.testing.assert_array_equal(found[: ids - 1], stored[name])
        mean = stored[name].mean(0, dtype=np.float64).astype(stored[name].dtype)
        np.testing.assert_array_equal(found[ids - 1 :], np.tile(mean, (rows - ids + 1, 1)))
    added = rows - ids + 1
    assert f"the tokenizer has {ids} ids and the embedding {ids - 1} rows: {added} rows are added, each" in said(capsys)


def test_a_tied_embedding_grows_once_and_bfloat16_stays(change, mesh):
    folder = change("tied", lambda held: {name: x.astype(ml_dtypes.bfloat16) for name, x in held.items()})
    source = loading.open_model(folder)
    grown = source.fitting(source.decoder.vocab_size + 3)
    assert grown.tensors.read(EMBEDDING).dtype == ml_dtypes.bfloat16
    tree = weights.load_params(grown.tensors, grown.decoder, mesh, head="lm", dtype="float32")
    assert len(tree["embedding"]) == grown.decoder.vocab_size and "head" not in tree


def test_no_rows_are_added_where_none_is_needed(mesh, capsys):
    source = loading.open_model(RECORDED / "untied")
    assert source.fitting(source.decoder.vocab_size) is source
    with pytest.raises(UserError, match="belongs to another model"):
        source.fitting(source.decoder.vocab_size + loading.FEW_IDS + 1)
    assert said(capsys) == ""
