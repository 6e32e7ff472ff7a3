"""Tokenizers from Hugging Face folders and from inside GGUF files."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mpo_jax.errors import UserError
from mpo_jax.models.hf import peft
from mpo_jax.models.hf.hub import local_model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a Hugging Face folder, or from inside a GGUF file. Python code in the folder is never run.

    Raises:
      UserError: if there is none or it cannot be read.
    """
    folder = Path(folder)
    if peft.is_adapter(folder) and not _has_tokenizer(folder):
        folder = local_model(peft.read_settings(folder).base)
    if folder.suffix == ".gguf":
        from mpo_jax.models.gguf.tokenizer import read_tokenizer

        return read_tokenizer(folder)
    if not _has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer.json or tokenizer.model: a model folder needs its tokenizer")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the parser in Rust raises nothing more special
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: its tokenizer is Python code (auto_map in tokenizer_config.json), which is never run here: "
                "use a folder whose tokenizer_class is one of transformers' own"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
