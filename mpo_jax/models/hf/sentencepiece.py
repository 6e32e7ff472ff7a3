"""Tokenizers of `tokenizer.model` files, rebuilt as fast Hugging Face tokenizers without the package sentencepiece.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece): pieces with their scores and types,
and how text is normalised. Its ids are those of sentencepiece itself, also where transformers' own conversion differs:
it drops a space at the start of a text, and takes some models without a tokenizer_config.json for others.
"""

import json
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mpo_jax.errors import UserError
from mpo_jax.untrusted import read_bytes, read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces."""
UNIGRAM, BPE = 1, 2
"""Kinds of models."""
SPACE = "\u2581"
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
"""Files beside the model that transformers reads, besides tokenizer_config.json."""
INSTEAD = "use a folder with a tokenizer.json"


@dataclass(frozen=True)
class Pieces:
    """What a tokenizer.model holds.

    Attributes:
      types, scores: of each piece.
      kind: UNIGRAM or BPE.
      special: ids of the unknown token, BOS, EOS and padding by transformers' names; those that are not there are left
        out.
      character_map: the compiled normalisation of characters; empty for none.
      adds_space: whether text gets a space in front.
      collapses_spaces: whether spaces at the ends and double ones are dropped.
    """

    pieces: list[str]
    types: list[int]
    scores: list[float]
    kind: int
    byte_fallback: bool
    special: Mapping[str, int]
    character_map: bytes
    adds_space: bool
    collapses_spaces: bool


def read_pieces(path: Path) -> Pieces:
    """Reads a tokenizer.model.

    Raises:
      UserError: if it is no sentencepiece model, is cut off, or is of a kind that is not supported.
    """
    try:
        message = list(_fields(read_bytes(path)))
        pieces = [dict(_fields(value)) for number, value in message if number == 1]
        trainer = {k: v for number, value in message if number == 2 for k, v in _fields(value)}
        normalizer = {k: v for number, value in message if number == 3 for k, v in _fields(value)}
        names = [piece[1].decode("utf-8") for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise UserError(
            f"{path} is no sentencepiece model, or it is cut off (Llama 3's tokenizer.model is another kind): {INSTEAD}"
        ) from error
    kind = trainer.get(3, UNIGRAM)
    if not names or kind not in (UNIGRAM, BPE):
        raise UserError(f"{path}: a sentencepiece model of kind {kind} is not supported: {INSTEAD}")
    # numbers are two's complement; -1 is none
    ids = {name: trainer.get(number, default) for name, number, default in
           (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))}  # fmt: skip
    return Pieces(
        pieces=names,
        types=[piece.get(3, NORMAL) for piece in pieces],
        scores=scores,
        kind=kind,
        byte_fallback=bool(trainer.get(35, 0)),
        special={name: i for name, i in ids.items() if 0 <= i < len(names)},
        character_map=normalizer.get(2, b""),
        adds_space=bool(normalizer.get(3, 1)),
        collapses_spaces=bool(normalizer.get(4, 1)),
    )


def load_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with a tokenizer.model alone, under its tokenizer_config.json if there is one.

    Prompts start with BOS unless that says `add_bos_token: false`, as of Llama, Mistral and Gemma.

    Raises:
      UserError: as `read_pieces`.
    """
    path = folder / "tokenizer.model"
    pieces = read_pieces(path)
    configured = _json(folder / "tokenizer_config.json")
    tokenizer = _tokenizer(pieces, path)
    special = {f"{name}_token": pieces.pieces[i] for name, i in pieces.special.items()}
    bos, eos = special.get("bos_token"), special.get("eos_token")
    before = bos if configured.get("add_bos_token", True) else None
    after = eos if configured.get("add_eos_token", False) else None
    if before or after:
        single = " ".join([*([before] if before else []), "$A", *([after] if after else [])])
        ids = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for file in BESIDE:
            if (folder / file).is_file():
                (copy / file).write_bytes(read_bytes(folder / file))
        # the classes that it may name rebuild the tokenizer in their own way, or are code
        own = {key: value for key, value in configured.items() if key not in ("tokenizer_class", "auto_map")}
        own = special | {key: value for key, value in own.items() if value is not None or key not in special}
        (copy / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
        tokenizer.save(str(copy / "tokenizer.json"))
        return PreTrainedTokenizerFast.from_pretrained(str(copy), clean_up_tokenization_spaces=False)


def bpe(
    tokens: Sequence[str], types: Sequence[int], merges: list[tuple[str, str]], where: str, **options: Any
) -> Tokenizer:
    """BPE over the tokens in use: the unused ones fill the embedding's rows, and must never be sampled.

    Args:
      where: what holds tokens and merges, for messages.

    Raises:
      UserError: if the merges are not of these tokens.
    """
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    try:
        return Tokenizer(models.BPE(vocab, merges, **options))
    except Exception as error:  # the library in Rust raises nothing more special
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} do not fit together: {reason}") from error


def sentencepiece_bpe(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], where: str, *, byte_fallback: bool = True
) -> Tokenizer:
    """BPE whose scores say in which order pieces merge, without normalisation.

    Args:
      where: as for `bpe`.
    """
    # text never makes a control or byte token, whose score says nothing
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    ranked = []
    for token, i in pieces.items():
        for cut in range(1, len(token)):
            left, right = pieces.get(token[:cut]), pieces.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], left, right, (token[:cut], token[cut:])))
    merges = [pair for *_, pair in sorted(ranked)]
    unknown = next((token for token, token_type in zip(tokens, types, strict=True) if token_type == UNKNOWN), None)
    return bpe(tokens, types, merges, where, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)


def set_spaces(tokenizer: Tokenizer, *, adds_space: bool, before: Sequence[normalizers.Normalizer] = ()) -> None:
    """Spaces become `\u2581` and back; `adds_space` puts one in front of every text, and decoding takes it off."""
    steps: list[normalizers.Normalizer] = [*before, normalizers.Replace(" ", SPACE)]
    strip = []
    if adds_space:
        steps.insert(len(before), normalizers.Prepend(SPACE))
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def add_special(tokenizer: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tells a tokenizer which tokens are found whole in a text: the control ones, which are special, and the user's."""
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            # not normalised, so that they are found in the raw text as they are spelt
            added = AddedToken(token, special=token_type == CONTROL, normalized=False)
            (tokenizer.add_special_tokens if token_type == CONTROL else tokenizer.add_tokens)([added])


def _tokenizer(pieces: Pieces, path: Path) -> Tokenizer:
    tokens, types = pieces.pieces, pieces.types
    if spaced := [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and SPACE in token]:
        raise UserError(f"{path}: the user-defined piece {spaced[0]!r} with a space is not supported: {INSTEAD}")
    if pieces.kind == BPE:
        tokenizer = sentencepiece_bpe(
            tokens, types, pieces.scores, f"{path}: its pieces", byte_fallback=pieces.byte_fallback
        )
    else:
        unknown = pieces.special.get("unk")
        tokenizer = Tokenizer(
            models.Unigram([*zip(tokens, pieces.scores, strict=True)], unknown, byte_fallback=pieces.byte_fallback)
        )
        # control pieces are in its vocabulary: cut in two, one that a text spells out stays text
        spelled = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token, kind in zip(tokens, types, strict=True)
                   if kind in (CONTROL, UNKNOWN, UNUSED, BYTE) and len(token) > 1]  # fmt: skip
        if spelled:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(spelled)), "isolated")  # type: ignore[assignment]
    before: list[normalizers.Normalizer] = []
    if pieces.character_map:
        before.append(normalizers.Precompiled(pieces.character_map))
    if pieces.collapses_spaces:
        before += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    set_spaces(tokenizer, adds_space=pieces.adds_space, before=before)
    add_special(tokenizer, tokens, types)
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: integers, bytes of 4 or 8, or bytes of a length.

    Raises:
      ValueError: if it is none, or is cut off.
    """
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if shift > 70:
                raise ValueError("not a protocol buffer")
            if byte < 128:
                return value - (1 << 64) if value >> 63 else value

    while place < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}[wire] if wire in (1, 5) else varint() if wire == 2 else -1
        if length < 0 or place + length > len(data) or not number:
            raise ValueError("not a protocol buffer")
        yield number, data[place : place + length]
        place += length
