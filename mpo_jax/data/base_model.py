"""What a model on disk is called in the names of stages: a hash of its files."""

import hashlib
import json
from pathlib import Path

from mpo_jax.data.sources import fingerprint_files
from mpo_jax.models.hf import peft_config
from mpo_jax.models.hf.ends import end_ids, read_end_ids
from mpo_jax.models.hf.hub import is_wanted, local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer


def fingerprint_model(path: str, cache: Path | None = None) -> str:
    """A hash of a model's files: changed weights count as another model, a moved or copied folder as the same one.

    In a folder the files that a model is read from count, with their names; notes beside them do not.

    Args:
      cache: folder of files' digests from earlier runs.
    """
    local = local_model(path)
    if local.is_file():
        return fingerprint_files([local], cache)
    files = sorted(file for file in local.iterdir() if file.is_file() and is_wanted(file))
    content = [[file.name, fingerprint_files([file], cache)] for file in files]
    if peft_config.is_adapter(local):
        content.append(["base", fingerprint_model(str(peft_config.base_of(local)), cache)])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fingerprint_base(path: str, cache: Path | None = None) -> str:
    """`fingerprint_model` of a policy's base model; with several end tokens another one, since one was known before.

    Args:
      cache: as for `fingerprint_model`.
    """
    whole, local = fingerprint_model(path, cache), local_model(path)
    described = peft_config.described_by(local)
    if described.is_file() or not read_end_ids(described):
        return whole
    ends = end_ids(load_tokenizer(local))
    return whole if len(ends) == 1 else hashlib.sha256(json.dumps([whole, ends]).encode()).hexdigest()
