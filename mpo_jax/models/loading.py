"""Whole models: sizes, parameters and run-time options together, from folders and GGUF files, to folders."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mpo_jax import types
from mpo_jax.config.schema import AdapterConfig, ArchitectureConfig, ModelConfig, TextConfig
from mpo_jax.errors import UserError
from mpo_jax.models import adapter, forward, quantised
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.decoder import FLOAT32
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import ends, families, found, peft, peft_config, safetensors_folder, weights
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import save_tokenizer
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.sharding import replicated
from mpo_jax.types import Head, Params

VOCAB_MULTIPLE = 8
FEW_IDS = 16
"""Ids beyond the embedding's rows, such as a `[PAD]`, for which rows are added; more are another model's."""
SPARE_ROWS = 1024
"""Embedding rows that a model may have beyond its tokenizer's ids, or an eighth of them: padding to round sizes."""


@dataclass(frozen=True)
class Source:
    """A model on disk, before its weights are read."""

    decoder: DecoderConfig
    tensors: weights.Tensors
    scored_at_end: bool = False
    """Of a reward model, whether its score belongs to the end token of the response; see `found.READOUT`."""

    @property
    def head(self) -> Head:
        """A value head makes it a reward model or critic."""
        return "value" if found.SCORE in self.tensors.names() else "lm"

    def fitting(self, num_ids: int) -> "Source":
        """The same model with a row of the embedding for each of a tokenizer's ids, if it lacks a few.

        Raises:
          UserError: if the tokenizer belongs to another model.
        """
        rows = self.decoder.vocab_size
        check_vocabulary(num_ids, self.decoder, self.tensors.where)
        if num_ids <= rows:
            return self
        more = _whole_rows(num_ids)
        grown = found.Grown(self.tensors, more, num_ids, rows, self.decoder.family)
        return dataclasses.replace(self, decoder=dataclasses.replace(self.decoder, vocab_size=more), tensors=grown)

    def say_notes(self) -> None:
        """Prints what is done to the tensors beyond reading them."""
        for note in getattr(self.tensors, "notes", ()):
            console.print(f"  {self.tensors.where}: {note}", soft_wrap=True, markup=False)


def open_model(path: str | Path, *, label: str | None = None) -> Source:
    """Sizes and tensors of a Hugging Face folder, a PEFT folder with its base, a GGUF file or a hub id.

    Args:
      label: of a classifier of several labels the one whose logit is the score, as `reward.label`.

    Raises:
      UserError: nothing there, a broken file, or an architecture that is not supported.
    """
    local = local_model(str(path))
    if local.suffix == ".gguf":
        from mpo_jax.models.gguf import weights as gguf_weights

        return Source(gguf_weights.read_config(local), gguf_weights.GgufTensors(local))
    if peft_config.is_adapter(local):
        base = open_model(below := peft_config.base_of(local), label=label)
        adapted = peft.AdaptedTensors(local, peft_config.read_settings(local), base.tensors, base.decoder)
        if not adapted.replaces(found.SCORE):
            return dataclasses.replace(base, tensors=adapted)
        tensors = found.as_found(adapted, below, base.decoder.family, tied=False, label=label)
        return Source(base.decoder, tensors, found.is_scored_at_end(local))
    decoder, tensors = families.read_config(local), safetensors_folder.SafetensorsFolder(local)
    tensors = found.as_found(tensors, local, decoder.family, tied=decoder.tie_embeddings, label=label)
    return Source(decoder, tensors, found.is_scored_at_end(local))


@dataclass(frozen=True)
class Options:
    """How a model's arithmetic runs and is stored.

    Attributes:
      dtype: of the arithmetic.
      frozen_dtype: of the parameters of a model that does not train; None: that of the arithmetic.
      remat: what the backward pass computes again.
      attention: over whole rows.
      logit_chunk: tokens a device whose logits exist at one time.
    """

    dtype: str = "float32"
    frozen_dtype: str | None = None
    remat: Literal["none", "dots", "full"] = "none"
    attention: str = "blocked"
    logit_chunk: int = 1024

    @classmethod
    def of(cls, config: ModelConfig) -> "Options":
        """A configuration's, `auto` resolved on this machine."""
        return cls(
            dtype=machine.compute_dtype(config),
            frozen_dtype=machine.frozen_dtype(config),
            remat=config.remat,
            attention=machine.attention(config),
            logit_chunk=config.logit_chunk,
        )

    def model(self, decoder: DecoderConfig, mesh: Mesh, adapted: Adapter | None = None) -> Model:
        """The static side of a model of these sizes."""
        return Model(
            adapter=adapted,
            decoder=decoder,
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
            # counted a device here, and of the whole batch in the model
            logit_chunk=self.logit_chunk * mesh.shape["data"] * mesh.shape["fsdp"],
        )


def check_positions(decoder: DecoderConfig, text: TextConfig) -> None:
    """Raises UserError if prompt and response together do not fit the model's positions."""
    length = text.max_prompt_tokens + text.max_response_tokens
    if length > decoder.max_positions:
        raise UserError(
            f"text.max_prompt_tokens={text.max_prompt_tokens} + text.max_response_tokens="
            f"{text.max_response_tokens} = {length}, but the model has {decoder.max_positions} positions: lower them"
        )


def check_vocabulary(num_ids: int, decoder: DecoderConfig, folder: str | Path) -> None:
    """Raises UserError where the tokenizer has more than a few ids beyond the embedding, or far fewer than it has rows.

    Args:
      num_ids: the tokenizer's largest id plus one.
    """
    if num_ids > decoder.vocab_size + FEW_IDS:
        raise UserError(
            f"{folder}: the tokenizer has {num_ids} ids, but the embedding has {decoder.vocab_size} rows "
            "(vocab_size in config.json): the tokenizer belongs to another model"
        )
    if decoder.vocab_size - num_ids > max(SPARE_ROWS, decoder.vocab_size // 8):
        raise UserError(
            f"{folder}: the tokenizer has only {num_ids} ids, but the embedding has {decoder.vocab_size} rows "
            "(vocab_size in config.json): the tokenizer belongs to another model"
        )


def check_source(source: Source, num_ids: int, text: TextConfig | None, *, head: Head) -> None:
    """Checks a model that will be loaded, without its weights.

    Args:
      num_ids: the tokenizer's largest id plus one.
      text: limits that must fit the model's positions; None: any.

    Raises:
      UserError: if a tensor is missing or superfluous, a file is cut off, the texts are too long for its positions, or
        the tokenizer does not fit its embedding.
    """
    weights.check_tensors(source.tensors, source.decoder, head=head)
    if text is not None:
        check_positions(source.decoder, text)
    check_vocabulary(num_ids, source.decoder, source.tensors.where)


@contextlib.contextmanager
def naming(key: str, path: str) -> Iterator[None]:
    """Puts the configuration key that names a model in front of an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}={path}: {error}") from error


def load(
    path: str | Path,
    options: Options,
    mesh: Mesh,
    *,
    text: TextConfig | None = None,
    head: Head = "lm",
    frozen: bool = False,
    num_ids: int | None = None,
    label: str | None = None,
) -> tuple[Model, Params]:
    """A model from disk: float32 master parameters that train, or frozen ones of the frozen type.

    Args:
      text: limits that must fit the model's positions.
      num_ids: the tokenizer's largest id plus one, for which the embedding gets rows if it lacks a few; None: any.
      label: as for `open_model`.

    Raises:
      UserError: nothing there, a broken file, another head, or an architecture that is not supported.
    """
    source = open_model(path, label=label)
    if num_ids is not None:
        source = source.fitting(num_ids)
    if text is not None:
        check_positions(source.decoder, text)
    source.say_notes()
    dtype = (options.frozen_dtype or options.dtype) if frozen else "float32"
    quantise = dtype == "int8"
    tree = weights.load_params(
        source.tensors, source.decoder, mesh, head=head, dtype=options.dtype if quantise else dtype, quantise=quantise
    )
    return options.model(source.decoder, mesh), types.frozen(tree) if frozen else types.trainable(tree)


def stored(tree: types.Tree, frozen_dtype: str, dtype: str) -> types.Tree:
    """A model's parameters as one that does not train holds them.

    Args:
      frozen_dtype: of all that is not computed in float32; int8 stands for quantised kernels of layers.
      dtype: of the arithmetic, and then of the rest.
    """
    held = dtype if frozen_dtype == "int8" else frozen_dtype

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf.astype(jnp.float32 if name.endswith(FLOAT32) else held)

    cast_tree: types.Tree = jax.tree_util.tree_map_with_path(cast, tree)
    return quantised.quantised(cast_tree) if frozen_dtype == "int8" else cast_tree


def freeze(params: Params, options: Options, mesh: Mesh) -> Params:
    """A model that trains, as one that does not: in the frozen type, copied."""
    frozen_dtype = options.frozen_dtype or options.dtype

    def store(tree: types.Tree) -> types.Tree:
        return stored(tree, frozen_dtype, options.dtype)

    tree = types.merge(params)
    shardings = forward.param_shardings(jax.eval_shape(store, tree), mesh)
    return types.frozen(jax.jit(store, out_shardings=shardings)(tree))


def make_adapter(config: AdapterConfig, decoder: DecoderConfig) -> Adapter:
    """What a configuration's adapters are for a model of these sizes.

    Raises:
      UserError: if the model has no such kernels, or adapters of them alone cannot be written for PEFT.
    """
    adapted = Adapter.of(config, decoder)
    peft_config.check_targets(adapted, decoder)
    return adapted


def adapt(model: Model, params: Params, config: AdapterConfig, mesh: Mesh, key: jax.Array) -> tuple[Model, Params]:
    """A frozen model with fresh adapters that train, and with its value head, if it has one, trained whole.

    The frozen part consists of the given arrays themselves, without copies.

    Args:
      key: A is drawn from it; B is zero.
    """
    tree, head = types.merge(params), _head(params)
    adapted = make_adapter(config, model.decoder)
    model = dataclasses.replace(model, adapter=adapted)
    shapes = forward.abstract_split(model, head=head)["trainable"]
    shardings = forward.param_shardings(shapes, mesh)

    layers = forward.abstract_params(model.decoder)["layers"]

    def init_adapter(key: jax.Array) -> types.Tree:
        return adapter.init(adapted, layers, key)

    low = jax.jit(init_adapter, out_shardings={"layers": shardings["layers"]})(key)
    if head == "value":
        # a copy: a training state takes its parameters over, and a reward model may share this one
        tree = {**tree, "score": jax.tree.map(jnp.copy, tree["score"])}
    return model, adapter.split(tree, low, head)


def to_train(
    model: Model, params: Params, config: AdapterConfig | None, mesh: Mesh, key: jax.Array, *, new_head: bool
) -> tuple[Model, Params]:
    """A loaded model as a stage trains it: whole, or frozen with fresh adapters.

    Args:
      params: frozen if there are adapters, and trainable otherwise.
      key: as for `adapt`.
      new_head: whether a language model gets a value head of zeros.
    """
    if new_head:
        params = with_value_head(model, params, mesh)
    return (model, params) if config is None else adapt(model, params, config, mesh, key)


def _head(params: Params) -> Head:
    return "value" if "score" in params["frozen"] or "score" in params["trainable"] else "lm"


def init(decoder: DecoderConfig, mesh: Mesh, key: jax.Array) -> Params:
    """Fresh parameters drawn from `key`, placed on the mesh."""
    shardings = forward.param_shardings(forward.abstract_params(decoder), mesh)

    def init_parameters(key: jax.Array) -> types.Tree:
        return forward.init_params(decoder, key)

    return types.trainable(jax.jit(init_parameters, out_shardings=shardings)(key))


def scratch_sizes(sizes: ArchitectureConfig, num_ids: int) -> DecoderConfig:
    """The sizes of a model from scratch whose tokenizer has `num_ids` ids.

    Raises:
      UserError: if the heads do not divide.
    """
    if sizes.num_heads % sizes.num_kv_heads:
        raise UserError(
            f"model.architecture.num_heads={sizes.num_heads} is no multiple of num_kv_heads={sizes.num_kv_heads}"
        )
    return from_architecture(sizes, _whole_rows(num_ids))


def _whole_rows(num_ids: int) -> int:
    """Rows of an embedding for so many ids; those beyond the ids are never sampled."""
    return -(-num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def from_architecture(architecture: ArchitectureConfig, vocab_size: int) -> DecoderConfig:
    """The sizes in a configuration's model.architecture; all layers are alike."""
    sizes = architecture.model_dump()
    layer = LayerSpec(rope_theta=sizes.pop("rope_theta"))
    return DecoderConfig(vocab_size=vocab_size, pattern=(layer,), **sizes)


def with_value_head(model: Model, params: Params, mesh: Mesh) -> Params:
    """A reward model's starting point from a language model: the same trunk and a zero value head.

    A frozen model's trunk is not copied.
    """
    if params["frozen"]:
        head = forward.abstract_params(model.decoder, head="value")["score"]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=replicated(mesh)), head)
        trunk = {name: leaf for name, leaf in params["frozen"].items() if name != "head"}
        return types.frozen({**trunk, "score": zeros})
    shardings = forward.param_shardings(forward.abstract_params(model.decoder, head="value"), mesh)

    def add_value_head(tree: types.Tree) -> types.Tree:
        return forward.with_score_head(tree, model.decoder)

    return types.trainable(jax.jit(add_value_head, out_shardings=shardings)(types.merge(params)))


def whole(model: Model, params: Params) -> types.Tree:
    """All parameters, with adapters folded into the kernels, in the types in which they are held."""
    tree = types.merge(params)
    if model.adapter is None:
        return tree
    return jax.jit(adapter.folded, static_argnums=(1, 2))(tree, model.adapter, model.dtype)


ADAPTER = "adapter"
"""The PEFT folder beside a model that was trained by adapters."""


def save(
    folder: Path,
    model: Model,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str = "float32",
    base: str | None = None,
    scored_at_end: bool = False,
) -> None:
    """Writes a Hugging Face folder: config.json, safetensors files and the tokenizer's files. Adapters are folded in.

    Args:
      base: what adapters change; they are then also written by themselves, in a PEFT folder beside this one.
      scored_at_end: as for `Source`.
    """
    if model.adapter is not None and base is not None:
        peft.save_weights(folder.parent / ADAPTER, params["trainable"], model.decoder)
    tree = whole(model, params)
    weights.save_params(folder, tree, model.decoder, dtype=dtype)
    head: Head = "value" if "score" in tree else "lm"
    save_description(folder, model, tokenizer, head=head, dtype=dtype, base=base, scored_at_end=scored_at_end)


def save_description(
    folder: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: Head = "lm",
    dtype: str = "float32",
    base: str | None = None,
    scored_at_end: bool = False,
) -> None:
    """All of a model's folder but the weights, so that `mpo export` can read the checkpoints of unfinished training.

    Args:
      base, scored_at_end: as for `save`.
    """
    if jax.process_index() != 0:
        return
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    families.save_config(folder, model.decoder, head=head, dtype=dtype, **ids)
    save_tokenizer(tokenizer, folder)
    if len(several := ends.end_ids(tokenizer)) > 1:
        ends.write_end_ids(folder, list(several), bos_id=ids["bos_id"], pad_id=ids["pad_id"])
    if model.adapter is not None and base is not None:
        peft_config.save_settings(folder.parent / ADAPTER, model.adapter, model.decoder, base=base, head=head)
        save_tokenizer(tokenizer, folder.parent / ADAPTER)
    for written in (folder, folder.parent / ADAPTER) if scored_at_end else ():
        if written.is_dir():
            found.write_readout(written)
