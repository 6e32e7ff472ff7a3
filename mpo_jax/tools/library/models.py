"""Models with their tokenizer and mesh: loading and saving them."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mpo_jax.config.schema import MeshConfig, ModelConfig, TextConfig
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime import sharding
from mpo_jax.types import Head, Params, PromptBatch

MAX_TOKENS = 512
"""Tokens of prompt and of response, each, unless half of the model's positions are fewer."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on a mesh, with its tokenizer.

    Attributes:
      model: what stays fixed: sizes, arithmetic.
      params: {"trainable": tree, "frozen": tree}.
      text: limits and joins of prompts and responses.
    """

    model: Model
    params: Params
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    text: TextConfig

    @property
    def codec(self) -> TextCodec:
        """Text to ids and back."""
        return TextCodec(self.tokenizer, self.text)

    def with_params(self, params: Params) -> "LoadedModel":
        """The same model with other parameters."""
        return dataclasses.replace(self, params=params)


def make_mesh(*, data: int | None = None, fsdp: int | None = None, tensor: int = 1) -> Mesh:
    """A mesh over this process's view of the devices.

    Args:
      data: copies of the model; gradients are summed over them.
      fsdp: devices over which parameters and moments are divided. With neither `data` nor `fsdp` all devices are.
      tensor: devices over which heads, feed-forward and vocabulary are divided.

    Raises:
      UserError: if there are fewer devices.
    """
    if data is None and fsdp is None:
        fsdp = max(len(jax.devices()) // tensor, 1)
    return sharding.make_mesh(MeshConfig(data=data or 1, fsdp=fsdp or 1, tensor=tensor))


def check_rows(rows: PromptBatch, model: LoadedModel) -> None:
    """Raises UserError where a host batch does not divide over the model's mesh, or its rows have too many tokens."""
    sharding.check_batch(len(rows.prompt_len), model.mesh, "batch_size")
    responses = np.asarray(rows.response_len)
    longest = int((np.asarray(rows.prompt_len) + (responses.max(1) if responses.size else 0)).max())
    if longest > model.model.decoder.max_positions:
        raise UserError(
            f"a row has {longest} tokens, but the model has {model.model.decoder.max_positions} positions: give the "
            "reader of the rows a smaller max_prompt_tokens or max_response_tokens"
        )


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    remat: Literal["none", "dots", "full"] = "dots",
    frozen: bool = False,
) -> LoadedModel:
    """A language model from a Hugging Face folder, a .gguf file or a hub id.

    Args:
      mesh: None for all devices (`make_mesh()`).
      max_prompt_tokens, max_response_tokens: None for 512 each, or half of the model's positions if they are fewer.
      compute_dtype: of the arithmetic; auto: float32 on CPU, bfloat16 elsewhere. Parameters that train are float32.
      remat: what the backward pass computes again.
      frozen: stored in the arithmetic's type, for a model that does not train.

    Raises:
      UserError: nothing there, a broken file, or an architecture that is not supported.
    """
    return _load(path, "lm", mesh, max_prompt_tokens, max_response_tokens, compute_dtype, remat, frozen)


def load_reward(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    remat: Literal["none", "dots", "full"] = "dots",
    frozen: bool = True,
) -> LoadedModel:
    """A reward model (a sequence classifier with one label); arguments as of `load`.

    Raises:
      UserError: as `load`; also if it is a language model.
    """
    return _load(path, "value", mesh, max_prompt_tokens, max_response_tokens, compute_dtype, remat, frozen)


def _load(
    path: str | Path,
    head: Head,
    mesh: Mesh | None,
    max_prompt_tokens: int | None,
    max_response_tokens: int | None,
    compute_dtype: Literal["auto", "float32", "bfloat16"],
    remat: Literal["none", "dots", "full"],
    frozen: bool,
) -> LoadedModel:
    mesh = make_mesh() if mesh is None else mesh
    decoder = loading.open_model(path).decoder
    most = min(MAX_TOKENS, decoder.max_positions // 2)
    text = TextConfig(max_prompt_tokens=max_prompt_tokens or most, max_response_tokens=max_response_tokens or most)
    options = loading.Options.of(ModelConfig(compute_dtype=compute_dtype, remat=remat))
    tokenizer = load_tokenizer(local_model(str(path)))
    loading.check_vocabulary(TextCodec(tokenizer, text).vocab_size, decoder, path)
    with jax.set_mesh(mesh):
        model, params = loading.load(path, options, mesh, text=text, head=head, frozen=frozen)
    return LoadedModel(model, params, tokenizer, mesh, text)


def save(
    model: LoadedModel, folder: str | Path, *, dtype: Literal["float32", "bfloat16", "float16"] = "float32"
) -> None:
    """Writes a Hugging Face folder that transformers and `load` read: config.json, safetensors, tokenizer.

    Raises:
      UserError: if the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder")
    with jax.set_mesh(model.mesh):
        loading.save(folder, model.model, model.params, model.tokenizer, dtype=dtype)
