"""Tokenizers from Hugging Face folders and from inside GGUF files."""

import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from mpo_jax.errors import UserError
from mpo_jax.models.hf import peft_config
from mpo_jax.models.hf.ends import attach_end_ids
from mpo_jax.models.hf.sentencepiece import load_sentencepiece
from mpo_jax.untrusted import check_file, parse_json, read_json, read_text

READ = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
"""Files beside tokenizer.json that transformers reads in Python; that one is read in Rust, which limits nesting."""
SHOWN = 60
"""Characters of a pattern that an error shows."""
_PATTERN = re.compile(r'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')
_TOKEN = re.compile(
    # escapes and classes of characters, with classes in them as Oniguruma has; then groups, then repetitions
    r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\]\\])*\]|[()]"
    r"|(?P<unlimited>[*+][+?]?|\{\d*,\}[+?]?)|[?]|\{\d*,?\d+\}|.",
    re.DOTALL,
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a Hugging Face folder, or from inside a GGUF file. Python code in the folder is never run.

    It carries the end tokens that the folder lists (see `ends.end_ids`).

    Raises:
      UserError: if there is none or it cannot be read.
    """
    folder = Path(folder)
    described = peft_config.described_by(folder)
    if not _has_tokenizer(folder):
        folder = described
    if folder.suffix == ".gguf":
        from mpo_jax.models.gguf.tokenizer import read_tokenizer

        return read_tokenizer(folder)
    _check_files(folder)
    if not _has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer.json or tokenizer.model: a model folder needs its tokenizer")
    tokenizer: Any = _load(folder) if (folder / "tokenizer.json").is_file() else load_sentencepiece(folder)
    attach_end_ids(tokenizer, described)
    return tokenizer


def input_ids(tokenizer: PreTrainedTokenizerBase, texts: str | list[str], **options: Any) -> Any:
    """The ids of a text, or of each of several, with the options of the tokenizer's call.

    Raises:
      UserError: if the tokenizer panics, as where a pattern of its own would try too many ways to match; names it.
    """
    try:
        return tokenizer(texts, **options).input_ids
    except BaseException as error:
        if not _is_panic(error):
            raise
        reason = (str(error).splitlines() or ["no reason"])[0]
        raise UserError(
            f"the tokenizer in {tokenizer.name_or_path} fails on a text: {reason}: use another tokenizer, or leave "
            "out rows with very long words"
        ) from error


def _is_panic(error: BaseException) -> bool:
    """Whether it comes from a panic in Rust, which is no Exception and has no public type."""
    return not isinstance(error, Exception) and type(error).__name__ == "PanicException"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer's files, such that transformers 4.57 reads them too.

    Version 5 names a class there, and a kind of list, that version 4 does not know; it reads their older names itself.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_files(folder: Path) -> None:
    """Checks what transformers reads of a tokenizer, since it would wait for a pipe, or recurse into deep brackets.

    Raises:
      UserError: no file, a broken one, or a pattern that takes for ever; names the file.
    """
    for path in sorted({*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("tokenizer.model")}):
        if path.name == "tokenizer.json":
            _check_patterns(path, read_text(path))
        elif path.name in READ and path.exists():
            read_json(path)
        elif path.exists():
            check_file(path)


def _check_patterns(path: Path, text: str) -> None:
    """Raises UserError for a regular expression that may try more ways to match than any text leaves time for.

    Found by its form: something repeated without limit, inside of something that is repeated without limit.
    """
    for found in _PATTERN.finditer(text):
        pattern = parse_json(found[1], path, str)
        if repeats_repeated(pattern):
            raise UserError(
                f"{path}: the pattern {pattern[:SHOWN]!r} repeats what is repeated in it, which takes for ever on some "
                "texts, so this tokenizer is not run"
            )


def repeats_repeated(pattern: str) -> bool:
    """Whether a regular expression has a repetition without limit around another one, such as (a+)+."""
    # per open group, whether something in it is repeated; the first one stands for the whole
    repeated, closed = [False], False
    for token in _TOKEN.finditer(pattern):
        kind = token[0]
        if kind == "(":
            repeated.append(False)
            closed = False
        elif kind == ")" and len(repeated) > 1:
            closed = repeated.pop()
            repeated[-1] |= closed
        elif token["unlimited"]:
            # a possessive one, a++, gives nothing back
            possessive = kind.endswith("+") and len(kind) > 1
            if closed and not possessive:
                return True
            repeated[-1] |= not possessive
            closed = False
        else:
            closed = False
    return False


def _load(folder: Path) -> PreTrainedTokenizerBase:
    try:
        # an attribute, since with the class comes the list of all of transformers' models, in half a second
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # the parser in Rust raises nothing more special, and where it panics no Exception
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: its tokenizer is Python code (auto_map in tokenizer_config.json), which is never run here: "
                "use a folder whose tokenizer_class is one of transformers' own"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
