"""Loads and saves models with their tokenizer and mesh."""

import dataclasses
import shutil
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
from mpo_jax.runtime.processes import is_main, wait
from mpo_jax.types import Head, Params, PromptBatch

MAX_TOKENS = 512
"""Default limit for prompt tokens and for response tokens, unless half the model's positions is less."""


@dataclasses.dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model on a mesh, with its tokenizer.

    Attributes:
      model: sizes and arithmetic, which training does not change.
      params: {"trainable": tree, "frozen": tree}.
      text: length limits of prompts and responses, and the rules for joining them.
      scored_at_end: of a reward model, whether its score belongs to the end token of the response, as training here
        puts it there.
    """

    model: Model
    params: Params
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    text: TextConfig
    scored_at_end: bool = False

    def __repr__(self) -> str:
        decoder, count = self.model.decoder, sum(leaf.size for leaf in jax.tree.leaves(self.params))
        kind = "reward model" if self.head == "value" else "language model"
        return f"<{decoder.family} {kind}, {count:,} parameters, mesh {dict(self.mesh.shape)}>"

    @property
    def head(self) -> Head:
        """`value` for a reward model, `lm` for a language model."""
        return "value" if "score" in {**self.params["trainable"], **self.params["frozen"]} else "lm"

    def check_head(self, head: Head, what: str) -> None:
        """Raises UserError if the model has the other head; `what` names its role."""
        if self.head != head:
            kinds = {"lm": "a language model", "value": "a reward model"}
            raise UserError(f"{what} must be {kinds[head]}, but this is {kinds[self.head]}")

    @property
    def codec(self) -> TextCodec:
        """The codec between text and ids."""
        return TextCodec(self.tokenizer, self.text)

    def with_params(self, params: Params) -> "LoadedModel":
        """The same model with other parameters."""
        return dataclasses.replace(self, params=params)


def make_mesh(*, data: int | None = None, fsdp: int | None = None, tensor: int = 1) -> Mesh:
    """A mesh over the devices that this process sees.

    Args:
      data: number of model replicas; gradients are summed over them.
      fsdp: number of devices that parameters and moments are sharded over; with neither `data` nor `fsdp`, all devices.
      tensor: number of devices that heads, feed-forward and vocabulary are sharded over.

    Raises:
      UserError: if there are too few devices.
    """
    if data is None and fsdp is None:
        fsdp = max(len(jax.devices()) // tensor, 1)
    return sharding.make_mesh(MeshConfig(data=data or 1, fsdp=fsdp or 1, tensor=tensor))


def check_rows(rows: PromptBatch, model: LoadedModel, *, num_responses: int | None = None, new_tokens: int = 0) -> None:
    """Checks a host batch against the model that reads it.

    Args:
      num_responses: how many responses a row must have; None: any number.
      new_tokens: tokens that will be sampled after each prompt.

    Raises:
      UserError: if the batch does not divide over the mesh, its rows have another number of responses, or a row is
        longer than the model has positions.
    """
    sharding.check_batch(len(rows.prompt_len), model.mesh, "batch_size")
    responses = np.asarray(rows.response_len)
    if num_responses is not None and responses.shape[1] != num_responses:
        wanted = {0: "prompts alone", 1: "demonstrations, with one response", 2: "pairs, with two responses"}
        raise UserError(
            f"the rows must be {wanted[num_responses]}; these have {responses.shape[1]} responses: see read_pairs, "
            "read_demonstrations and read_prompts"
        )
    check_lengths(np.asarray(rows.prompt_len) + (responses.max(1) if responses.size else 0) + new_tokens, model)


def check_lengths(length: np.ndarray, model: LoadedModel) -> None:
    """Raises UserError if a row of these lengths, in tokens, is longer than the model has positions."""
    positions = model.model.decoder.max_positions
    if len(length) and int(length.max()) > positions:
        raise UserError(
            f"a row takes {int(length.max())} tokens, but the model has {positions} positions: give the reader of the "
            "rows a smaller max_prompt_tokens or max_response_tokens, or sample fewer new tokens"
        )


def check_same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, what: str) -> None:
    """Raises UserError if two tokenizers give other ids: a model would read other text than was written."""
    if one is not other and one.get_vocab() != other.get_vocab():
        raise UserError(f"{what} have different tokenizers: their token ids differ")


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
      mesh: device mesh; None: all devices (`make_mesh()`).
      max_prompt_tokens, max_response_tokens: length limits; None: 512 each, or half the model's positions if less.
      compute_dtype: type of the arithmetic; auto: float32 on CPU, bfloat16 elsewhere. Trained parameters are float32.
      remat: which activations the backward pass recomputes.
      frozen: whether to store parameters in the arithmetic's type, for a model that does not train.

    Raises:
      UserError: if the path does not exist, a file is broken, or the architecture is not supported.
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
    label: str | None = None,
) -> LoadedModel:
    """A reward model: a sequence classifier, or a model with a v_head or value_head; arguments as for `load`.

    Args:
      label: of several labels, the name or number of the one whose logit is the score; None: the only one, or of two
        the second's logit less the first's.

    Raises:
      UserError: as for `load`, or if the path holds a language model.
    """
    return _load(path, "value", mesh, max_prompt_tokens, max_response_tokens, compute_dtype, remat, frozen, label)


def _load(
    path: str | Path,
    head: Head,
    mesh: Mesh | None,
    max_prompt_tokens: int | None,
    max_response_tokens: int | None,
    compute_dtype: Literal["auto", "float32", "bfloat16"],
    remat: Literal["none", "dots", "full"],
    frozen: bool,
    label: str | None = None,
) -> LoadedModel:
    mesh = make_mesh() if mesh is None else mesh
    source = loading.open_model(path, label=label)
    most = min(MAX_TOKENS, source.decoder.max_positions // 2)
    text = TextConfig(max_prompt_tokens=max_prompt_tokens or most, max_response_tokens=max_response_tokens or most)
    options = loading.Options.of(ModelConfig(compute_dtype=compute_dtype, remat=remat))
    tokenizer = load_tokenizer(local_model(str(path)))
    ids = TextCodec(tokenizer, text).vocab_size
    with jax.set_mesh(mesh):
        model, params = loading.load(path, options, mesh, text=text, head=head, frozen=frozen, num_ids=ids, label=label)
    return LoadedModel(model, params, tokenizer, mesh, text, source.scored_at_end)


def save(
    model: LoadedModel,
    folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face folder that transformers and `load` can read: config.json, safetensors, tokenizer.

    The folder is written beside its place and renamed into it, so it never looks finished before it is.

    Args:
      overwrite: whether a model that is already there is replaced.

    Raises:
      UserError: if the folder exists and is not empty, unless `overwrite` is set and it holds a model.
    """
    folder = Path(folder)
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (overwrite and (folder / "config.json").is_file()):
        hint = "" if overwrite else ", or set overwrite=True"
        raise UserError(f"{folder} exists and is not empty: name a new folder{hint}")
    partial = folder.with_name(f".{folder.name}.partial")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
    with jax.set_mesh(model.mesh):
        loading.save(
            partial, model.model, model.params, model.tokenizer, dtype=dtype, scored_at_end=model.scored_at_end
        )
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    wait(f"process 0 writes {folder.name}")
