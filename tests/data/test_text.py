"""mpo_jax.data.text: one BOS, one EOS, which end is cut, and text that survives the way to ids and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mpo_jax.config.schema import TextConfig, ToyConfig
from mpo_jax.data import text as text_module
from mpo_jax.data import toy
from mpo_jax.data.chat import Chat
from mpo_jax.data.text import Fitted, TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models.hf.tokenizer import load_tokenizer

BOS, EOS, UNK = 1, 2, 0  # stories260K's


@pytest.fixture(scope="module")
def stories_folder(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def stories(stories_folder):
    """A SentencePiece tokenizer with byte fallback that adds a BOS and defines no pad."""
    return load_tokenizer(stories_folder)


@pytest.fixture(scope="module")
def toy_tokenizer():
    return toy.make_tokenizer()


def test_one_bos_starts_a_prompt_where_the_tokenizer_adds_one(stories, toy_tokenizer):
    codec = TextCodec(stories, TextConfig())
    fitted = codec.prompt("Once upon a time")
    assert fitted.ids == stories("Once upon a time").input_ids
    assert fitted.ids.count(BOS) == 1 and fitted.ids[0] == BOS
    assert not fitted.truncated
    assert codec.response(" there").ids.count(BOS) == 0
    without = TextCodec(stories, TextConfig(add_bos="false")).prompt("Once upon a time")
    assert without.ids == fitted.ids[1:]
    assert TextCodec(stories, TextConfig(add_bos="true")).prompt("Once upon a time") == fitted

    codec = TextCodec(toy_tokenizer, TextConfig())
    assert not codec.adds_bos
    assert codec.prompt(" should i quit").ids == [toy_tokenizer.get_vocab()[w] for w in (" should", " i", " quit")]


def test_a_template_surrounds_the_prompt(stories):
    codec = TextCodec(stories, TextConfig(prompt_template="Human: {prompt}\n\nAssistant:"))
    assert codec.prompt("hi {prompt}").ids == stories("Human: hi {prompt}\n\nAssistant:").input_ids


@pytest.mark.parametrize("name", ["stories", "toy_tokenizer"])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_long_prompt_keeps_its_end_and_its_bos(request, name, limit):
    tokenizer = request.getfixturevalue(name)
    text = "my boss lost the keys. should i quit?"
    whole = TextCodec(tokenizer, TextConfig()).prompt(text).ids
    bos = whole[:1] if name == "stories" else []
    codec = TextCodec(tokenizer, TextConfig(max_prompt_tokens=limit))
    if limit == len(bos):
        with pytest.raises(UserError, match=r"text\.max_prompt_tokens=1"):
            codec.prompt(text)
    else:
        fitted = codec.prompt(text)
        assert fitted.ids == bos + whole[len(whole) - limit + len(bos) :]
        assert len(fitted.ids) == limit and fitted.truncated
    exact = TextCodec(tokenizer, TextConfig(max_prompt_tokens=len(whole))).prompt(text)
    assert (exact.ids, exact.truncated) == (whole, False)


def test_an_empty_prompt_needs_a_bos(stories, toy_tokenizer):
    assert TextCodec(stories, TextConfig()).prompt("").ids == [BOS]
    for codec in (TextCodec(toy_tokenizer, TextConfig()), TextCodec(stories, TextConfig(add_bos="false"))):
        with pytest.raises(UserError, match="no room for a prompt"):
            codec.prompt("")


@pytest.mark.parametrize("name", ["stories", "toy_tokenizer"])
def test_a_complete_response_ends_with_the_only_eos_and_a_cut_one_has_none(request, name):
    tokenizer = request.getfixturevalue(name)
    codec = TextCodec(tokenizer, TextConfig())
    eos = tokenizer.eos_token_id
    whole = codec.response(" my boss lost the keys").ids
    assert whole[-1] == eos and whole.count(eos) == 1
    for limit in range(1, len(whole) + 1):
        fitted = TextCodec(tokenizer, TextConfig(max_response_tokens=limit)).response(" my boss lost the keys")
        assert (fitted.ids, fitted.truncated) == (whole[:limit], limit < len(whole))
        assert fitted.ids.count(eos) == (limit == len(whole))
    assert (codec.response("").ids, codec.decode([eos]), codec.decode([])) == ([eos], "", "")


@pytest.mark.parametrize("special", ["</s>", "<s>", "<unk>"])
def test_text_that_spells_a_special_token_stays_text(stories, special):
    codec = TextCodec(stories, TextConfig())
    text = f" the tag {special} ends it"
    ids = codec.response(text).ids
    assert not {BOS, EOS, UNK} & set(ids[:-1])
    assert codec.decode(ids) == text


def test_decode_stops_at_the_first_eos_and_skips_special_tokens(stories):
    codec = TextCodec(stories, TextConfig())
    here, more = codec.response(" here").ids, codec.response(" more").ids
    assert codec.decode(here + more) == " here"
    assert codec.decode([*here[:-1], BOS]) == " here"
    assert codec.decode(here[:-1] + more[:-1]) == " here more"


def test_prompt_and_response_join_without_a_second_space(stories):
    """The ids of the two sides are those of the whole text, where the seam is a space and a piece starts there."""
    codec = TextCodec(stories, TextConfig())
    joined = codec.prompt("Once upon a").ids + codec.response(" time").ids
    assert joined == [*stories("Once upon a time").input_ids, EOS]


ROUND_TRIPS = [
    " time", "  two spaces", "    four", " \n", " \n\nnew line first", " ends in spaces  ", " a\n\nb", " \ttab",
    " 😀", " 👩‍👩‍👧 ok",
    " é", " 漢字とかな", " Ünï ☂ — “quoted”", " n't do , that .", " x' s", " \x00", " \ufffd", " <0x0A>", " [UNK]",
]  # fmt: skip


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_a_response_with_its_space_survives_sentencepiece(stories, text):
    codec = TextCodec(stories, TextConfig())
    assert codec.adds_space
    assert codec.decode(codec.response(text).ids) == text


# a lone space is the tokenizer's own and leaves no token; U+2581 is how SentencePiece writes a space
@given(rest=st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), min_size=1))
def test_any_response_with_its_space_survives_sentencepiece(stories, rest):
    codec = TextCodec(stories, TextConfig())
    assert codec.decode(codec.response(" " + rest).ids) == " " + rest


@given(rest=st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), min_size=1))
def test_a_response_without_a_space_gets_one(stories, rest):
    """It is written straight behind the prompt, and SentencePiece has no ids for a text that starts without a space."""
    codec = TextCodec(stories, TextConfig())
    expected = rest if rest.startswith(" ") and rest != " " else " " + rest
    assert codec.decode(codec.response(rest).ids) == (expected if rest != " " else "")


PHRASES = sorted({f" {p}{end}" for values in toy.FACTS.values() for p in values for end in ("", ",", ".", "?")})


@given(st.lists(st.sampled_from(PHRASES + [f" {p}" for p in toy.RAMBLES + toy.FILLERS])).map("".join))
def test_any_text_of_the_toy_world_survives(toy_tokenizer, text):
    codec = TextCodec(toy_tokenizer, TextConfig())
    assert not codec.adds_space
    ids = codec.response(text).ids
    assert toy_tokenizer.unk_token_id not in ids
    assert codec.decode(ids) == text


@pytest.mark.parametrize(("name", "specials"), [("stories", [UNK, BOS]), ("toy_tokenizer", [0, 1])])
@pytest.mark.parametrize("extra", [0, 56])
def test_allowed_keeps_eos_and_text_alone(request, name, specials, extra):
    tokenizer = request.getfixturevalue(name)
    size = len(tokenizer)
    allowed = TextCodec(tokenizer, TextConfig()).allowed(size + extra)
    assert (allowed.shape, allowed.dtype) == ((size + extra,), bool)
    assert [i for i in range(size + extra) if not allowed[i]] == [*specials, *range(size, size + extra)]
    assert allowed[tokenizer.eos_token_id]


def test_vocab_size_covers_every_id(stories, toy_tokenizer):
    for tokenizer in (stories, toy_tokenizer):
        assert TextCodec(tokenizer, TextConfig()).vocab_size == max(tokenizer.get_vocab().values()) + 1


def test_saving_and_loading_changes_no_id(stories, toy_tokenizer, tmp_path):
    prompt = toy.preferences(ToyConfig(num_test=1), test=True)[0].prompt
    for name, tokenizer in {"stories": stories, "toy": toy_tokenizer}.items():
        codec = TextCodec(tokenizer, TextConfig())
        codec.save(tmp_path / name)
        again = TextCodec(load_tokenizer(tmp_path / name), TextConfig())
        assert again.prompt(prompt) == codec.prompt(prompt)
        assert again.decode(again.response(" my boss, should i quit").ids) == " my boss, should i quit"
        assert (again.eos_id, again.adds_bos, again.adds_space) == (codec.eos_id, codec.adds_bos, codec.adds_space)
        assert again.tokenizer.pad_token_id == tokenizer.pad_token_id


def test_a_tokenizer_without_eos_or_without_a_wanted_bos_is_refused(toy_tokenizer):
    with pytest.raises(UserError, match=r"text\.add_bos=true, but the tokenizer defines no BOS"):
        TextCodec(toy_tokenizer, TextConfig(add_bos="true"))
    tokenizer = toy.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="defines no EOS token"):
        TextCodec(tokenizer, TextConfig())


@pytest.mark.parametrize(
    "content", ["{broken", "{}", "null", '{"added_tokens": [], "model": {}}', '{"added_tokens": [{"id": 0}]}']
)
def test_a_broken_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path / "absent")


# byte-level tokenizers: with and without a BOS of their own, pad = eos or none


def byte_level(*, adds_bos: bool, pad_is_eos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and Llama 3's: every text has ids, and an emoji is several."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lines = ["my boss lost the keys, should i quit my job?", "the boss and the keys are lost", "Ünï 漢字 😀"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(lines, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
        )
    pad = {"pad_token": "<eos>"} if pad_is_eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", **pad)


BYTES = {adds_bos: byte_level(adds_bos=adds_bos) for adds_bos in (True, False)}
TEXT = st.text(st.characters(codec="utf-8"))
EMOJI = "👩‍👩‍👧 é漢"


def test_a_defined_bos_that_the_tokenizer_does_not_add_is_not_added():
    without, with_bos = (TextCodec(BYTES[adds_bos], TextConfig()) for adds_bos in (False, True))
    assert not without.adds_bos and with_bos.adds_bos
    assert with_bos.prompt("my boss").ids == [0, *without.prompt("my boss").ids]
    assert TextCodec(BYTES[False], TextConfig(add_bos="true")).prompt("my boss") == with_bos.prompt("my boss")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("add_bos", ["auto", "true", "false"])
@pytest.mark.parametrize("limit", [4, 100])
def test_a_template_that_writes_bos_gets_no_second_one(adds_bos, add_bos, limit):
    tokenizer = byte_level(adds_bos=adds_bos)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    text = Chat(tokenizer).prompt([{"role": "user", "content": "my boss lost the keys"}])
    fitted = TextCodec(tokenizer, TextConfig(add_bos=add_bos, max_prompt_tokens=limit)).prompt(text)
    rest = tokenizer("[my boss lost the keys]", add_special_tokens=False).input_ids
    assert len(rest) > 4
    assert fitted == Fitted([0, *rest[-(limit - 1) :]], 1 + len(rest))


def test_pad_that_is_eos_neither_leaves_the_response_nor_is_forbidden():
    codec = TextCodec(BYTES[True], TextConfig())
    assert codec.special("pad") == codec.eos_id
    assert codec.response(" my boss").ids[-1] == codec.eos_id
    assert np.flatnonzero(~codec.allowed(codec.vocab_size)).tolist() == [codec.special("bos")]


def test_added_special_tokens_and_holes_are_not_sampled():
    tokenizer = byte_level(adds_bos=True)
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    assert "<turn>" not in tokenizer.all_special_tokens
    tokenizer.add_tokens(["<tool>"])
    vocab = tokenizer.get_vocab()
    turn, tool = vocab["<turn>"], vocab["<tool>"]
    allowed = TextCodec(tokenizer, TextConfig()).allowed(tool + 1)
    assert not allowed[turn] and allowed[tool]

    hole = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "b": 5}, unk_token="a"))
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=hole, eos_token="<eos>"), TextConfig())
    assert codec.vocab_size == 6
    assert codec.allowed(8).tolist() == [True, True, False, False, False, True, False, False]


@pytest.mark.parametrize("adds_bos", [True, False])
@given(text=TEXT)
def test_any_response_survives_a_byte_level_tokenizer(adds_bos, text):
    codec = TextCodec(BYTES[adds_bos], TextConfig())
    assert not codec.adds_space
    fitted = codec.response(text)
    assert codec.decode(fitted.ids) == text
    assert fitted.ids.count(codec.eos_id) == 1 and fitted.full == len(fitted.ids)


@pytest.mark.parametrize("text", ["a\r\nb\r\n", "\r\n", " x' s .", "<eos>", "<bos> a", EMOJI, "a" * 100_000])
def test_line_ends_spaced_punctuation_and_huge_rows_survive(text):
    codec = TextCodec(BYTES[True], TextConfig(max_response_tokens=200_000))
    assert codec.decode(codec.response(text).ids) == text


@pytest.mark.parametrize("name", ["stories", "bytes"])
def test_a_response_cut_within_a_character_decodes_to_its_whole_characters(request, name):
    tokenizer = BYTES[True] if name == "bytes" else request.getfixturevalue(name)
    text = f" {EMOJI}"
    whole = TextCodec(tokenizer, TextConfig()).response(text).ids
    for limit in range(1, len(whole)):
        codec = TextCodec(tokenizer, TextConfig(max_response_tokens=limit))
        fitted = codec.response(text)
        assert fitted == Fitted(whole[:limit], len(whole)) and fitted.truncated
        assert text.startswith(codec.decode(fitted.ids).rstrip("\ufffd"))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_full_counts_the_tokens_before_cutting(adds_bos):
    codec = TextCodec(BYTES[adds_bos], TextConfig(max_prompt_tokens=3, max_response_tokens=3))
    num = len(BYTES[adds_bos]("my boss lost", add_special_tokens=False).input_ids)
    assert (codec.prompt("my boss lost").full, codec.response("my boss lost").full) == (num + adds_bos, num + 1)
    assert not TextCodec(BYTES[adds_bos], TextConfig()).prompt("my boss lost").truncated


# batches


@pytest.mark.parametrize("name", ["stories", "bytes"])
@given(texts=st.lists(st.one_of(TEXT, st.sampled_from(["", " ", "\r\n", "POST: " + "a b\n" * 20 + "\n\nTL;DR:"]))))
def test_a_batch_is_its_texts_one_by_one(request, name, texts):
    tokenizer = BYTES[True] if name == "bytes" else request.getfixturevalue(name)
    codec = TextCodec(tokenizer, TextConfig(max_prompt_tokens=12, max_response_tokens=5))
    assert codec.prompts(texts) == [codec.prompt(text) for text in texts]
    assert codec.responses(texts) == [codec.response(text) for text in texts]


def test_chunks_of_a_batch_lose_nothing(monkeypatch):
    texts = [f"my boss {i}" * (i % 5) for i in range(23)]
    codec = TextCodec(BYTES[True], TextConfig())
    whole = codec.prompts(texts), codec.responses(texts)
    calls = []
    tokenizer = codec.tokenizer
    monkeypatch.setattr(text_module, "CHUNK_TEXTS", 4)
    monkeypatch.setattr(text_module, "CHUNK_CHARACTERS", 60)
    monkeypatch.setattr(codec, "tokenizer", lambda chunk, **kw: calls.append(chunk) or tokenizer(chunk, **kw))
    monkeypatch.setattr(codec, "special", {"bos": tokenizer.bos_token_id}.get)
    assert (codec.prompts(texts), codec.responses(texts)) == whole
    assert [text for chunk in calls[: len(calls) // 2] for text in chunk] == texts
    assert {len(chunk) for chunk in calls} >= {4, 1} and max(map(len, calls)) == 4
    assert all(len(chunk) == 1 or sum(map(len, chunk)) <= 60 for chunk in calls)


# the fingerprint


def test_the_fingerprint_changes_with_what_ids_depend_on_and_nothing_else(stories, toy_tokenizer):
    def fingerprint(tokenizer=None, **config):
        return TextCodec(tokenizer or BYTES[True], TextConfig(**config)).fingerprint

    base = fingerprint()
    turned = byte_level(adds_bos=True)
    turned.chat_template = "{{ messages }}"
    turned("a", truncation=True, max_length=1, padding="max_length")
    same = [fingerprint(turned, add_bos="true"), fingerprint(turned), fingerprint(byte_level(adds_bos=True))]
    same += [fingerprint(chat=True), fingerprint(length_buckets=1)]
    assert set(same) == {base} and len(base) == 64
    other_eos = byte_level(adds_bos=True)
    other_eos.eos_token = "<bos>"
    merged = byte_level(adds_bos=True)
    merged.add_tokens(["boss"])
    others = [
        fingerprint(byte_level(adds_bos=False)), fingerprint(other_eos), fingerprint(merged), fingerprint(stories),
        fingerprint(toy_tokenizer), fingerprint(add_bos="false"), fingerprint(prompt_template="Q: {prompt}"),
        fingerprint(max_prompt_tokens=511), fingerprint(max_response_tokens=511), fingerprint(truncation="start"),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


def test_the_fingerprint_survives_saving(stories, toy_tokenizer, tmp_path):
    for name, tokenizer in {"stories": stories, "toy": toy_tokenizer, "bytes": BYTES[True]}.items():
        codec = TextCodec(tokenizer, TextConfig())
        codec.save(tmp_path / name)
        assert TextCodec(load_tokenizer(tmp_path / name), TextConfig()).fingerprint == codec.fingerprint


def test_a_tokenizer_in_python_serves_too():
    codec = TextCodec(ByT5Tokenizer(extra_ids=0), TextConfig(max_prompt_tokens=4))
    assert codec.prompts([EMOJI, "ab"])[1] == codec.prompt("ab") == Fitted([ord("a") + 3, ord("b") + 3], 2)
    assert codec.decode(codec.response(f" {EMOJI}\r\n").ids) == f" {EMOJI}\r\n"
    same, other = (TextCodec(ByT5Tokenizer(extra_ids=n), codec.config).fingerprint for n in (0, 2))
    assert codec.fingerprint == same != other
