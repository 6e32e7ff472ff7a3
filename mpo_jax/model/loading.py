"""Whole models: sizes, parameters and run-time options together, from and to Hugging Face folders."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from mpo_jax.config import Config
from mpo_jax.errors import UserError
from mpo_jax.model import functional, weights
from mpo_jax.model.decoder import DecoderConfig
from mpo_jax.model.functional import Model
from mpo_jax.runtime import compute_dtype
from mpo_jax.text import TextCodec
from mpo_jax.types import Params

VOCAB_MULTIPLE = 8


def describe(decoder: DecoderConfig, config: Config) -> Model:
    """The static side of a model under this configuration.

    Raises:
      UserError: if prompt and response together do not fit the model's positions.
    """
    length = config.text.max_prompt_tokens + config.text.max_response_tokens
    if length > decoder.max_positions:
        raise UserError(
            f"text.max_prompt_tokens={config.text.max_prompt_tokens} + text.max_response_tokens="
            f"{config.text.max_response_tokens} = {length}, but the model has {decoder.max_positions} positions: "
            "lower them"
        )
    return Model(
        decoder=decoder,
        dtype=compute_dtype(config.model),
        remat=config.model.remat,
        attention=config.model.attention,
        # the config counts tokens a device, the model counts the batch's
        logit_chunk=config.model.logit_chunk * config.mesh.batch_shards,
    )


def check_vocabulary(codec: TextCodec, decoder: DecoderConfig, folder: str | Path) -> None:
    """Raises UserError where the tokenizer has ids beyond the embedding."""
    if codec.vocab_size > decoder.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {codec.vocab_size} ids, but the embedding has {decoder.vocab_size} rows "
            "(vocab_size in config.json): the tokenizer belongs to another model"
        )


def load(
    folder: Path, config: Config, mesh: Mesh, *, scalar: bool = False, frozen: bool = False
) -> tuple[Model, Params]:
    """A model from a folder: float32 master parameters, or `model.frozen_dtype` for one that will not train."""
    decoder = weights.read_config(folder)
    dtype = config.model.frozen_dtype if frozen else "float32"
    return describe(decoder, config), weights.load_params(folder, decoder, mesh, scalar=scalar, dtype=dtype)


def load_base(config: Config, codec: TextCodec, mesh: Mesh, key: jax.Array) -> tuple[Model, Params]:
    """The model that everything starts from: the checkpoint at model.path, or fresh parameters drawn from `key`."""
    if config.model.path is not None:
        check_vocabulary(codec, weights.read_config(config.model.path), config.model.path)
        return load(Path(config.model.path), config, mesh)
    sizes = config.model.architecture
    decoder = DecoderConfig(
        # rows beyond the tokenizer's ids are never sampled
        vocab_size=-(-codec.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        **sizes.model_dump(),
    )
    if sizes.num_heads % sizes.num_kv_heads:
        raise UserError(
            f"model.architecture.num_heads={sizes.num_heads} is no multiple of num_kv_heads={sizes.num_kv_heads}"
        )
    shardings = functional.param_shardings(functional.abstract_params(decoder), mesh)
    init = jax.jit(lambda key: functional.init_params(decoder, key), out_shardings=shardings)
    return describe(decoder, config), init(key)


def to_scalar(model: Model, params: Params, mesh: Mesh) -> Params:
    """A reward model's starting point from a language model's parameters: the same trunk and a zero scalar head."""
    shardings = functional.param_shardings(functional.abstract_params(model.decoder, scalar=True), mesh)
    return jax.jit(lambda p: functional.with_score_head(p, model.decoder), out_shardings=shardings)(params)


def save(folder: Path, model: Model, params: Params, codec: TextCodec) -> None:
    """Writes a Hugging Face folder: config.json, model.safetensors and the tokenizer's files."""
    weights.save_params(
        folder, params, model.decoder, eos_id=codec.eos_id, bos_id=codec.special("bos"), pad_id=codec.special("pad")
    )
    codec.save(folder)
