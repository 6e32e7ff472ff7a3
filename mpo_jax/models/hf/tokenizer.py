"""Tokenizers from Hugging Face folders and from inside GGUF files."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from mpo_jax.errors import UserError
from mpo_jax.models.hf import peft_config
from mpo_jax.models.hf.ends import attach_end_ids
from mpo_jax.models.hf.sentencepiece import load_sentencepiece


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
    if not _has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer.json or tokenizer.model: a model folder needs its tokenizer")
    tokenizer: Any = _load(folder) if (folder / "tokenizer.json").is_file() else load_sentencepiece(folder)
    attach_end_ids(tokenizer, described)
    return tokenizer


def _load(folder: Path) -> PreTrainedTokenizerBase:
    try:
        # an attribute, since with the class comes the list of all of transformers' models, in half a second
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the parser in Rust raises nothing more special
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: its tokenizer is Python code (auto_map in tokenizer_config.json), which is never run here: "
                "use a folder whose tokenizer_class is one of transformers' own"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
