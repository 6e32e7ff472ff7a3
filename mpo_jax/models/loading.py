"""Whole models: sizes, parameters and run-time options together, from folders and GGUF files, to folders."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from mpo_jax.config.schema import ArchitectureConfig, Config
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families, weights
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.runtime.machine import attention, compute_dtype, frozen_dtype
from mpo_jax.types import Head, Params

VOCAB_MULTIPLE = 8
SPARE_ROWS = 1024
"""Embedding rows that a model may have beyond its tokenizer's ids, or an eighth of them: padding to round sizes."""


@dataclass(frozen=True)
class Source:
    """A model on disk, before its weights are read."""

    decoder: DecoderConfig
    tensors: weights.Tensors

    @property
    def head(self) -> Head:
        """A value head makes it a reward model or critic."""
        return "value" if "score.weight" in self.tensors.names() else "lm"


def open_model(path: str | Path) -> Source:
    """Sizes and tensors of a Hugging Face folder, a GGUF file or a hub id.

    Raises:
      UserError: nothing there, a broken file, or an architecture that is not supported.
    """
    local = local_model(str(path))
    if local.suffix == ".gguf":
        from mpo_jax.models.gguf import weights as gguf_weights

        return Source(gguf_weights.read_config(local), gguf_weights.GgufTensors(local))
    return Source(families.read_config(local), weights.SafetensorsFolder(local))


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
        attention=attention(config.model),
        # the config counts tokens a device, the model counts the batch's
        logit_chunk=config.model.logit_chunk * config.mesh.batch_shards,
    )


def check_vocabulary(codec: TextCodec, decoder: DecoderConfig, folder: str | Path) -> None:
    """Raises UserError where the tokenizer has ids beyond the embedding, or far fewer than it has rows."""
    if codec.vocab_size > decoder.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {codec.vocab_size} ids, but the embedding has {decoder.vocab_size} rows "
            "(vocab_size in config.json): the tokenizer belongs to another model"
        )
    if decoder.vocab_size - codec.vocab_size > max(SPARE_ROWS, decoder.vocab_size // 8):
        raise UserError(
            f"{folder}: the tokenizer has only {codec.vocab_size} ids, but the embedding has {decoder.vocab_size} rows "
            "(vocab_size in config.json): the tokenizer belongs to another model"
        )


def load(
    path: str | Path, config: Config, mesh: Mesh, *, head: Head = "lm", frozen: bool = False
) -> tuple[Model, Params]:
    """A model from disk: float32 master parameters, or `model.frozen_dtype` for one that will not train."""
    source = open_model(path)
    dtype = frozen_dtype(config.model) if frozen else "float32"
    model = describe(source.decoder, config)
    return model, weights.load_params(source.tensors, source.decoder, mesh, head=head, dtype=dtype)


def load_base(config: Config, codec: TextCodec, mesh: Mesh, key: jax.Array) -> tuple[Model, Params]:
    """The model that everything starts from: the checkpoint at model.path, or fresh parameters drawn from `key`."""
    if config.model.path is not None:
        check_vocabulary(codec, open_model(config.model.path).decoder, config.model.path)
        return load(config.model.path, config, mesh)
    decoder = scratch_sizes(config, codec.vocab_size)
    shardings = forward.param_shardings(forward.abstract_params(decoder), mesh)
    init = jax.jit(lambda key: forward.init_params(decoder, key), out_shardings=shardings)
    return describe(decoder, config), init(key)


def scratch_sizes(config: Config, num_ids: int) -> DecoderConfig:
    """The sizes of a model from scratch whose tokenizer has `num_ids` ids.

    Raises:
      UserError: if the heads do not divide.
    """
    sizes = config.model.architecture
    if sizes.num_heads % sizes.num_kv_heads:
        raise UserError(
            f"model.architecture.num_heads={sizes.num_heads} is no multiple of num_kv_heads={sizes.num_kv_heads}"
        )
    # rows beyond the tokenizer's ids are never sampled
    return from_architecture(sizes, -(-num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)


def from_architecture(architecture: ArchitectureConfig, vocab_size: int) -> DecoderConfig:
    """The sizes in a configuration's model.architecture; all layers are alike."""
    sizes = architecture.model_dump()
    layer = LayerSpec(rope_theta=sizes.pop("rope_theta"))
    return DecoderConfig(vocab_size=vocab_size, pattern=(layer,), **sizes)


def with_value_head(model: Model, params: Params, mesh: Mesh) -> Params:
    """A reward model's starting point from a language model's parameters: the same trunk and a zero value head."""
    shardings = forward.param_shardings(forward.abstract_params(model.decoder, head="value"), mesh)
    return jax.jit(lambda p: forward.with_score_head(p, model.decoder), out_shardings=shardings)(params)


def save(folder: Path, model: Model, params: Params, codec: TextCodec, *, dtype: str = "float32") -> None:
    """Writes a Hugging Face folder: config.json, safetensors files and the tokenizer's files."""
    weights.save_params(folder, params, model.decoder, dtype=dtype)
    save_description(folder, model, codec, head="value" if "score" in params else "lm", dtype=dtype)


def save_description(
    folder: Path, model: Model, codec: TextCodec, *, head: Head = "lm", dtype: str = "float32"
) -> None:
    """All of a model's folder but the weights, so that `mpo export` can read the checkpoints of unfinished training."""
    if jax.process_index() != 0:
        return
    special = {"eos_id": codec.eos_id, "bos_id": codec.special("bos"), "pad_id": codec.special("pad")}
    families.save_config(folder, model.decoder, head=head, dtype=dtype, **special)
    codec.save(folder)
