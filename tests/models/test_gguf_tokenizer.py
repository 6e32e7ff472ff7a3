"""mpo_jax.models.gguf.tokenizer: tokenizers put into GGUF metadata come out with the same ids.

The patterns stand here as in the models' own tokenizer.json files.
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models.gguf.tokenizer import read_tokenizer
from tests.gguf_files import write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = WORDS + r"\p{N}{1,3}" + REST
QWEN2 = WORDS + r"\p{N}" + REST
CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's what they'll do, isn't it? THEY'RE quick.",
    "In 1984, 12345 people paid 3.14159 dollars (about 100000 cents) at 10:30.\n\n\tTabs  and   spaces\r\nlines\n",
    "naïve café déjà vu, 漢字とかな, emoji 😀🏳️‍🌈 and Ελληνικά, Русский текст.",
    "def f(x):\n    return x ** 2  # squares\n<|not special|> </s> don't Don'T DON'T",
] * 3
# mostly what splits differ in, and any other text
TEXTS = st.one_of(
    st.lists(st.sampled_from([*CORPUS, *SPECIAL, " ", "\n", "12", "é", "e\u0301", "'S", "hi"]), max_size=6).map(
        "".join
    ),
    st.text(st.sampled_from("aA1 29'stS\n\r\t.,é漢\u0301😀<|>"), max_size=40),
    st.text(max_size=20),
)


def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def pre_tokenizer(name):
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return {"default": gpt2, "gpt-2": gpt2, "llama-bpe": split(LLAMA3), "qwen2": split(QWEN2)}[name]


def trained(name: str, *, size: int = 420) -> Tokenizer:
    """A small byte-level tokenizer of the kind that llama.cpp calls `name`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    if "12" not in state["model"]["vocab"]:
        # where digits are split apart no merge joins them, so that the split itself would not show
        state["model"]["vocab"]["12"] = len(state["model"]["vocab"])
        state["model"]["merges"].append(["1", "2"])
    if name == "llama-bpe":
        # words that are tokens though no merges lead to them: why Llama 3 needs ignore_merges
        state["model"]["merges"] = state["model"]["merges"][:-40]
        state["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(state))


def metadata_of(tokenizer: Tokenizer, name: str) -> dict:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert [model["vocab"][token] for token in tokens] == list(range(len(tokens)))
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }


def read(folder, metadata, *, drop=(), **changes):
    path = folder / f"tokenizer-{len(list(folder.iterdir()))}.gguf"
    kept = {key: value for key, value in (metadata | changes).items() if key not in drop}
    return read_tokenizer(write_gguf(path, kept, {}, {}))


@pytest.fixture(scope="module", params=["default", "gpt-2", "smollm", "llama-bpe", "qwen2"])
def byte_level(request, tmp_path_factory):
    """A trained tokenizer, and what its GGUF metadata give."""
    original = trained(request.param)
    return original, read(tmp_path_factory.mktemp("gguf"), metadata_of(original, request.param))


def ids_of(tokenizer, text):
    return list(tokenizer(text, verbose=False).input_ids)


@given(text=TEXTS)
def test_byte_level_ids_and_text_are_the_original_s(byte_level, text):
    original, ours = byte_level
    ids = ids_of(ours, text)
    assert ids == original.encode(text).ids
    assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False)
    assert original.normalizer is not None or ours.decode(ids) == text


@pytest.mark.parametrize("value", [3, True, 1.5, "x", [3], ["x"], [1.5]], ids=str)
@pytest.mark.parametrize("key", ["model", "pre", "tokens", "token_type", "merges", "bos_token_id", "add_bos_token"])
def test_metadata_of_another_kind_are_read_or_refused_by_name(smollm, tmp_path, key, value):
    try:
        read(tmp_path, smollm, **{f"tokenizer.ggml.{key}": value})
    except UserError as error:
        assert "tokenizer.ggml" in str(error)


def test_the_kinds_differ():
    """So that one kind's tests could not pass with another's splits."""
    text = "1984 it'S 'S12345\n\n x e\u0301"
    pieces = {
        name: str(pre_tokenizer(name).pre_tokenize_str(text)) for name in ("default", "smollm", "llama-bpe", "qwen2")
    }
    assert len(set(pieces.values())) == 4


def test_a_word_that_is_a_token_needs_no_merges(tmp_path):
    """Llama 3's kind alone; the others build every word."""
    original = trained("llama-bpe")
    state = json.loads(original.to_str())
    state["model"]["ignore_merges"] = False
    built = Tokenizer.from_str(json.dumps(state))
    words = [word for word in " ".join(CORPUS).split(" ") if original.encode(word).ids != built.encode(word).ids]
    assert words
    for name in ("llama-bpe", "llama3", "llama-v3"):
        ours = read(tmp_path, metadata_of(original, name))
        assert all(ids_of(ours, word) == original.encode(word).ids for word in words)


@pytest.fixture(scope="module")
def smollm():
    return metadata_of(trained("smollm"), "smollm")


def test_special_tokens_and_template(smollm, tmp_path):
    ours = read(tmp_path, smollm)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (1, 2, 0, None)
    assert {i for i, token in ours.added_tokens_decoder.items() if token.special} == {0, 1, 2}
    assert ids_of(ours, "<|im_start|>")[0] == 1 and len(ids_of(ours, "<|im_start|>hi<|im_end|>")) >= 3
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert read(tmp_path, smollm, drop={"tokenizer.chat_template"}).chat_template is None


def test_text_that_spells_a_special_token_stays_text(smollm, tmp_path):
    ours = read(tmp_path, smollm)
    ids = ours("a<|im_end|>", split_special_tokens=True).input_ids
    assert 2 not in ids and ours.decode(ids) == "a<|im_end|>"


def test_user_defined_tokens_are_found_whole_but_are_no_special_ones(smollm, tmp_path):
    types = list(smollm["tokenizer.ggml.token_type"])
    types[0] = USER_DEFINED
    ours = read(tmp_path, smollm, **{"tokenizer.ggml.token_type": types}, drop={"tokenizer.ggml.padding_token_id"})
    assert 0 in ids_of(ours, "a <|endoftext|> b")
    assert not ours.added_tokens_decoder[0].special and ours.pad_token_id is None
    assert "<|endoftext|>" in ours.decode([0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "flag", "added"),
    [("smollm", True, True), ("smollm", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos(smollm, name, flag, added, tmp_path):
    """Where the file does not say, Llama 3 has one and the others have none."""
    drop = {"tokenizer.ggml.add_bos_token"} if flag is None else set()
    changes = {"tokenizer.ggml.pre": name} | ({} if flag is None else {"tokenizer.ggml.add_bos_token": flag})
    ours = read(tmp_path, smollm, drop=drop, **changes)
    assert (ids_of(ours, "hi")[0] == 1) == added
    assert ids_of(ours, "hi")[added:] == ours("hi", add_special_tokens=False).input_ids
    assert TextCodec(ours, TextConfig()).adds_bos == added


def test_padding_rows_are_no_tokens(smollm, tmp_path):
    """A file with as many tokens as the embedding has rows names those beyond the vocabulary as unused."""
    size, extra = len(smollm["tokenizer.ggml.tokens"]), [f"[PAD{i}]" for i in range(20)]
    ours = read(
        tmp_path,
        smollm,
        **{
            "tokenizer.ggml.tokens": smollm["tokenizer.ggml.tokens"] + extra,
            "tokenizer.ggml.token_type": smollm["tokenizer.ggml.token_type"] + [UNUSED] * 20,
        },
    )
    codec = TextCodec(ours, TextConfig())
    assert codec.vocab_size == size and not codec.allowed(size + 20)[size:].any()
    assert ids_of(ours, "quick [PAD3]") == ids_of(read(tmp_path, smollm), "quick [PAD3]")


def test_saved_folder_gives_the_same_tokenizer(byte_level, tmp_path):
    """Beside a config.json, by which transformers may choose a class of its own."""
    _, ours = byte_level
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 420}))
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*CORPUS, "<|im_start|>1984 e\u0301<|im_end|>"):
        assert ids_of(again, text) == ids_of(ours, text)
    assert again.chat_template == ours.chat_template and again.special_tokens_map == ours.special_tokens_map


# ---- SentencePiece -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data):
    """stories260K's tokenizer, and the metadata of the SentencePiece model that it came from."""
    original = Tokenizer.from_file(str(shared_data / "models" / "stories260K" / "tokenizer.json"))
    model = json.loads(original.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # a piece's score is minus its rank among the merges; single characters come after all of them
    rank = {"".join(pair): i for i, pair in reversed(list(enumerate(model["merges"])))}
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | {f"<0x{i:02X}>": BYTE for i in range(256)}
    types = [kinds.get(token, NORMAL) for token in tokens]
    scores = [
        float(-rank.get(t, 1000 + i)) if kind == NORMAL else 0.0
        for i, (t, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    return original, {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def sentencepiece(stories, tmp_path_factory):
    return stories[0], read(tmp_path_factory.mktemp("gguf"), stories[1])


STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her big red ball!"


@given(text=st.one_of(TEXTS, st.lists(st.sampled_from([*STORY.split(" "), " ", "  ", "</s>", "<s>"])).map(" ".join)))
def test_sentencepiece_ids_and_text_are_the_original_s(sentencepiece, text):
    original, ours = sentencepiece
    ids = ids_of(ours, text)
    assert ids == original.encode(text).ids
    assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False)


def test_sentencepiece_specials(sentencepiece):
    _, ours = sentencepiece
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, None)
    assert ids_of(ours, "hi")[0] == 1, "SentencePiece models start with BOS where the file does not say"
    assert 2 not in ours("a</s>", split_special_tokens=True, add_special_tokens=False).input_ids
    codec = TextCodec(ours, TextConfig())
    assert codec.adds_space and codec.decode(codec.response(" a ball").ids) == " a ball"


def test_control_tokens_are_never_built_from_text(stories, tmp_path):
    """Their score of 0 is the highest: with the pieces "<" and "/s>" about, a merge would come first of all."""
    _, metadata = stories
    more = ["<", "/", "s>", "/s>"]
    tokens = metadata["tokenizer.ggml.tokens"]
    added = [token for token in more if token not in tokens]
    ours = read(
        tmp_path,
        metadata,
        **{
            "tokenizer.ggml.tokens": tokens + added,
            "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"] + [NORMAL] * len(added),
            "tokenizer.ggml.scores": metadata["tokenizer.ggml.scores"] + [-500.0] * len(added),
        },
    )
    ids = ours("a</s>", split_special_tokens=True, add_special_tokens=False).input_ids
    assert 2 not in ids and ours.convert_ids_to_tokens(ids)[-1] == "/s>"


def test_no_space_prefix(stories, tmp_path):
    ours = read(tmp_path, stories[1], **{"tokenizer.ggml.add_space_prefix": False})
    ids = ours("once", add_special_tokens=False).input_ids
    assert not ours.convert_ids_to_tokens(ids)[0].startswith("\u2581")
    assert ours.decode(ours(" once", add_special_tokens=False).input_ids) == " once"


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert' is not supported; supported: gpt2, llama"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre='tekken' is not supported; supported: default, gpt-2"),
        ({"tokenizer.ggml.eos_token_id": 421}, "tokenizer.ggml.eos_token_id=421 is none of 421 tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries for 421 tokens"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, r"tokenizer\.ggml\.tokens and \.merges do not fit together"),
        ({"tokenizer.ggml.merges": ["zz"]}, r"tokenizer\.ggml\.tokens and \.merges do not fit together"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "tokenizer.ggml.scores has 1 entries"),
    ],
)
def test_unsupported(smollm, changes, message, tmp_path):
    with pytest.raises(UserError, match=rf"tokenizer-0\.gguf: {message}"):
        read(tmp_path, smollm, **changes)


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_metadata(smollm, key, tmp_path):
    with pytest.raises(UserError, match=rf"tokenizer-0\.gguf: the GGUF metadata has no tokenizer\.ggml\.{key}"):
        read(tmp_path, smollm, drop={f"tokenizer.ggml.{key}"})


def test_missing_scores(smollm, tmp_path):
    with pytest.raises(UserError, match=r"the GGUF metadata has no tokenizer\.ggml\.scores"):
        read(tmp_path, smollm, **{"tokenizer.ggml.model": "llama"})


def test_real_file(smollm2):
    """SmolLM2's tokenizer: digits one by one, markers whole, any text there and back."""
    ours = read_tokenizer(smollm2)
    assert ours.convert_ids_to_tokens(ids_of(ours, " hi 123")) == ["Ġhi", "Ġ", "1", "2", "3"]
    assert ids_of(ours, "<|im_start|>user\n") == [1, 4093, 198]
    for text in CORPUS:
        assert ours.decode(ids_of(ours, text)) == text
