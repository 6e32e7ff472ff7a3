"""mpo_jax.text: one BOS, one EOS, which end is cut, and text that survives the way to ids and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.config import TextConfig, ToyConfig
from mpo_jax.data import toy
from mpo_jax.errors import UserError
from mpo_jax.text import TextCodec, load_tokenizer

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
