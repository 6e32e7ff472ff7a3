"""Reward models for tests: copies of one that know the same words under other numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy


def with_other_ids(reward: Path, folder: Path, *, seed: int = 0) -> Path:
    """A copy of a reward model with a permuted vocabulary, embedding included: the same function of text.

    Args:
      reward: a folder with a word-level tokenizer, such as the toy world's.
      folder: of the copy.
    """
    shutil.copytree(reward.resolve(), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    new = np.random.default_rng(seed).permutation(len(vocab))
    assert sorted(vocab.values()) == list(range(len(vocab)))
    tokenizer["model"]["vocab"] = {token: int(new[i]) for token, i in vocab.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = int(new[token["id"]])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if (named := settings.get("added_tokens_decoder")) is not None:
        settings["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in named.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            config[name] = int(new[config[name]])
    (folder / "config.json").write_text(json.dumps(config))
    (weights,) = folder.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    (name,) = (name for name in tensors if "embed" in name)
    rows = tensors[name].copy()
    rows[new] = tensors[name][: len(vocab)]
    tensors[name] = rows
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    return folder
