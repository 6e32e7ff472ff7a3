"""The tokenizer inside a GGUF file, rebuilt as a fast Hugging Face tokenizer.

GGUF stores vocabulary, merges or scores, token types, and the name of a pre-tokenizer; the patterns behind the names
are those of the models' own tokenizer.json files.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mpo_jax.errors import UserError
from mpo_jax.models.gguf.file import GgufFile, open_gguf
from mpo_jax.models.hf.sentencepiece import NORMAL, add_special, bpe, sentencepiece_bpe, set_spaces

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
"""llama.cpp's names for Llama 3, which imply BOS, and that a word that is a token is not built from merges."""
SPLITS = {name: _WORDS + r"\p{N}{1,3}" + _REST for name in LLAMA3} | {"qwen2": _WORDS + r"\p{N}" + _REST}
"""Pre-tokenizers that split by one pattern."""


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
      UserError: a kind of tokenizer that is not supported, or missing metadata.
    """
    file = open_gguf(path)
    kind = file.require("tokenizer.ggml.model")
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2, llama")
    if len(types) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    tokenizer = _byte_level(file, tokens, types) if kind == "gpt2" else _sentencepiece(file, tokens, types)
    add_special(tokenizer, tokens, types)
    special = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = file.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            if not 0 <= token_id < len(tokens):
                raise UserError(f"{path}: tokenizer.ggml.{key}_token_id={token_id} is none of {len(tokens)} tokens")
            special[f"{name}_token"] = tokens[token_id]
    implied = kind == "llama" or file.get("tokenizer.ggml.pre") in LLAMA3
    if file.get("tokenizer.ggml.add_bos_token", implied) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A", special_tokens=[(bos, file.get("tokenizer.ggml.bos_token_id"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = file.get("tokenizer.chat_template")
    return fast


def _byte_level(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Byte-level BPE, as of GPT-2, Llama 3, Qwen and SmolLM."""
    merges: list[Any] = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    name = file.get("tokenizer.ggml.pre", "default")
    where = f"{file.path}: tokenizer.ggml.tokens and .merges"
    tokenizer = bpe(tokens, types, merges, where, ignore_merges=name in LLAMA3)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in SPLITS)
    if name in SPLITS:
        steps = [pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"), byte_level]
    elif name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif name in ("default", "gpt-2"):
        steps = [byte_level]
    else:
        known = ", ".join(("default", "gpt-2", "smollm", *SPLITS))
        raise UserError(f"{file.path}: tokenizer.ggml.pre={name!r} is not supported; supported: {known}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as of Llama 2 and Mistral: the scores say in which order pieces merge."""
    scores: list[float] = file.require("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise UserError(f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    tokenizer = sentencepiece_bpe(tokens, types, scores, f"{file.path}: tokenizer.ggml.tokens and .scores")
    set_spaces(tokenizer, adds_space=bool(file.get("tokenizer.ggml.add_space_prefix", True)))
    return tokenizer
