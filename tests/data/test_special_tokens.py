"""mpo_jax.data.special_tokens: end markers that responses spell, special tokens elsewhere, and what is said of them."""

import time

import pytest

from mpo_jax.config.schema import DataConfig, ModelConfig, TextConfig
from mpo_jax.data import toy
from mpo_jax.data.records import read_preferences
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.special_tokens import SpelledTokens, special_tokens
from mpo_jax.runtime.stage_warnings import collect_warnings
from tests.data.test_corpus import load_corpus, write
from tests.data.test_records import pair, refuse, source_of, user

EOS, PAD = str(toy.make_tokenizer().eos_token), str(toy.make_tokenizer().pad_token)


def spelled(end_markers="strip"):
    return SpelledTokens(toy.make_tokenizer, end_markers)


def test_the_special_tokens_of_a_tokenizer():
    assert set(special_tokens(toy.make_tokenizer())) == {EOS, PAD, "<unk>"}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f" a{EOS}", " a"),
        (f" a {EOS}\n", " a"),
        (f"a{EOS}{PAD} {PAD}", "a"),
        ("a<|im_end|>\n", "a"),  # another model's
        (EOS, ""),
        (" a ", " a "),
        (f"a {EOS} b", f"a {EOS} b"),
        ("a<unk>", "a<unk>"),
        ("see [1]", "see [1]"),
        ("<s>a</s>", "<s>a</s>"),  # HTML, unless it is this tokenizer's
        ("a<", "a<"),
    ],
)
def test_end_markers_are_stripped_from_the_end_alone(text, kept):
    assert spelled().response(text) == kept
    assert spelled("keep").response(text) == text


def test_without_brackets_no_tokenizer_is_loaded():
    assert SpelledTokens(refuse, "strip").response("plain text") == "plain text"


def test_what_is_found_is_said_once_with_its_count():
    found = spelled()
    for text in (f"a{EOS}", f"b{EOS}", f"c {PAD} d", "e"):
        found.response(text)
    found.prompt([user(f"f {EOS}"), user(f"g {PAD}")])
    found.prompt(f"plain {EOS}")
    ends, inside, turns = found.warnings()
    assert ends.startswith(f"2 responses end with a special token, such as {EOS} as text, which is stripped")
    assert "text.end_markers=keep" in ends
    assert inside.startswith(f"1 response has inside a special token, such as {PAD} as text")
    assert turns.startswith(f"1 conversation has inside a turn a special token, such as {EOS}, which")
    assert found.stripped() == (
        f"2 responses end with a special token, such as {EOS} as text, which is not scored: text.end_markers=keep "
        "leaves it in"
    )
    kept = spelled("keep")
    kept.response(f"a{EOS}")
    assert kept.stripped() is None and spelled().stripped() is None
    assert ["text.end_markers=strip takes it out" in message for message in kept.warnings()] == [True]
    assert spelled().warnings() == []
    one = spelled()
    one.response(f"a{EOS}")
    assert one.warnings()[0].startswith("1 response ends with a special token")


def test_rows_that_differ_by_an_end_marker_are_equal(tmp_path):
    rows = [pair("p", "a", f"a{EOS}"), pair("p", "a", EOS), pair("p", f"a{EOS}", "b")]
    kept, report = read_preferences(source_of(tmp_path, *rows), render=Renderer(refuse, spelled=spelled()))
    assert [(row.chosen, row.rejected) for row in kept] == [("a", "b")]
    assert dict(report.dropped) == {"chosen equals rejected": 1, "empty response": 1}


@pytest.mark.parametrize("kind", ["pairs", "hh", "tldr"])
def test_every_kind_of_rows_is_cleaned(tmp_path, kind):
    toy.make_tokenizer().save_pretrained(tmp_path / "model")
    start = "\n\nHuman: p\n\nAssistant:" if kind == "hh" else ""
    row = {"chosen": f"{start} a<|im_end|>", "rejected": f"{start} b{EOS}"}
    path = write(tmp_path / "a.jsonl", [row if kind == "hh" else {"prompt": "p", **row}])
    data = DataConfig(kind=kind, path=path, validation_fraction=0)
    sections = {"model": ModelConfig(path=str(tmp_path / "model"))}
    with collect_warnings() as warnings:
        corpus = load_corpus(data, **sections)
    assert [(one.chosen, one.rejected) for one in corpus.pairs] == [(" a", " b")]
    assert [one.response for one in corpus.demonstrations] == [" a"]
    assert len(warnings) == 1 and warnings[0].startswith("2 responses end with")
    with collect_warnings():
        kept = load_corpus(data, text=TextConfig(end_markers="keep"), **sections)
    assert kept.pairs[0].chosen == " a<|im_end|>"


@pytest.mark.parametrize("text", [" " * 300_000 + "x>", "<|im_end|>" * 30_000 + "x>", "\n<|im_end|>" * 30_000])
def test_a_long_row_of_spaces_or_markers_takes_no_time(text):
    strips, begin = spelled(), time.process_time()
    assert strips.response(text) == ("" if text.endswith("|>") else text)
    assert time.process_time() - begin < 2  # by a search from the start, minutes
