"""mpo_jax.models.hf.sentencepiece: a tokenizer.model alone gives sentencepiece's own ids, recorded from it."""

import json
import shutil
from pathlib import Path

import pytest

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models.hf.tokenizer import load_tokenizer

RECORDED = Path(__file__).resolve().parents[1] / "fixtures" / "sentencepiece"
EXPECTED = json.loads((RECORDED / "expected.json").read_text(encoding="utf-8"))
MODELS = [*EXPECTED["models"]]


def folder_of(name, tmp_path, **files):
    """A folder with the model alone, and these JSON files."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(RECORDED / f"{name}.model", folder / "tokenizer.model")
    for file, values in files.items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    return folder


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_text_are_sentencepiece_s(name, tmp_path):
    """Of words, spaces at any place, digits, bytes, and special tokens that a text spells out."""
    tokenizer, expected = load_tokenizer(folder_of(name, tmp_path)), EXPECTED["models"][name]
    assert [ids_of(tokenizer, text) for text in EXPECTED["texts"]] == expected["ids"]
    assert [tokenizer.decode(ids) for ids in expected["ids"]] == expected["decoded"]
    special = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    assert special == (expected["bos"], expected["eos"], expected["pad"])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_tokenizer_is_the_same(name, tmp_path):
    """As stages save it with their models: with a tokenizer.json."""
    tokenizer = load_tokenizer(folder_of(name, tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in EXPECTED["texts"]:
        assert ids_of(again, text) == ids_of(tokenizer, text)
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.special_tokens_map == tokenizer.special_tokens_map
    limits = TextConfig()
    assert TextCodec(again, limits).fingerprint == TextCodec(tokenizer, limits).fingerprint


def test_prompts_start_with_bos_unless_the_folder_says_otherwise(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    codec = TextCodec(load_tokenizer(folder_of("llama", tmp_path)), TextConfig())
    assert codec.adds_bos and codec.adds_space and codec.prompt("my boss").ids[0] == 1
    assert codec.response(" </s>").ids[-1] == codec.eos_id and codec.response(" </s>").ids.count(codec.eos_id) == 1
    without = folder_of("llama", tmp_path / "a", tokenizer_config={"add_bos_token": False})
    assert not TextCodec(load_tokenizer(without), TextConfig()).adds_bos
    both = folder_of("llama", tmp_path / "b", tokenizer_config={"add_eos_token": True})
    ids = load_tokenizer(both)("my boss").input_ids
    assert (ids[0], ids[-1]) == (1, 2)


def test_files_beside_the_model_count(tmp_path):
    """Its special tokens and template are taken; classes and code that it names are not."""
    config = {
        "tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": [None, "planted.Planted"]},
        "eos_token": "<unk>", "pad_token": "[PAD]", "chat_template": "{{ messages[0].content }}",
    }  # fmt: skip
    folder = folder_of("llama", tmp_path, tokenizer_config=config, added_tokens={"[PAD]": 330})
    (folder / "planted.py").write_text("raise AssertionError('the code ran')")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<unk>", "[PAD]", "<s>")
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert ids_of(tokenizer, EXPECTED["texts"][0]) == EXPECTED["models"]["llama"]["ids"][0]
    assert TextCodec(tokenizer, TextConfig()).vocab_size == len(tokenizer) == tokenizer.pad_token_id + 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"IQ== 0\nIg== 1\n",
        b"\x80\x05pickle",
        b"\n\x05abc",
        bytes(100),
        (RECORDED / "llama.model").read_bytes()[:-1],
    ],
)
def test_what_is_no_sentencepiece_model_is_refused(content, tmp_path):
    """Empty files, Llama 3's ranks of byte pairs, others, and a file that is cut off."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model.*: use a folder with a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_broken_json_beside_it_is_named(tmp_path):
    folder = folder_of("llama", tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: broken JSON"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_package_where_it_is_installed(name, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = load_tokenizer(folder_of(name, tmp_path))
    processor = sentencepiece.SentencePieceProcessor(str(RECORDED / f"{name}.model"))
    letters = "abmy ost  \n.1é日🙂"
    for i in range(2000):
        text = "".join(letters[(i * 7919 + j * j * 31) % len(letters)] for j in range(i % 23))
        assert ids_of(tokenizer, text) == processor.encode(text), text
