"""The sections `model` and `model.architecture`."""

from typing import Literal

from pydantic import Field

from mpo_jax.config.base import Section


class ArchitectureConfig(Section, frozen=True):
    """Sizes of a Llama trained from scratch, without `model.path`. The vocabulary is that of the tokenizer."""

    hidden_size: int = Field(default=64, gt=0, description="width of the residual stream")
    intermediate_size: int = Field(default=172, gt=0, description="width of the MLP's hidden layer")
    num_layers: int = Field(default=2, gt=0, description="transformer blocks")
    num_heads: int = Field(default=4, gt=0, description="query heads")
    num_kv_heads: int = Field(
        default=4, gt=0, description="key and value heads; fewer than num_heads: grouped-query attention"
    )
    head_dim: int = Field(default=16, gt=0, description="width of one head")
    max_positions: int = Field(default=512, gt=0, description="longest row in tokens, prompt and response together")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary position embedding")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of RMSNorm")
    tie_embeddings: bool = Field(default=True, description="use the embedding matrix as the output layer too")
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="standard deviation of the initial weights; output projections are scaled by 1/sqrt(2 num_layers)",
    )


class ModelConfig(Section, frozen=True):
    """The base model, and how it computes."""

    path: str | None = Field(
        default=None,
        description="base model: Hugging Face folder, .gguf file, or hub id (org/name, org/name@revision); "
        "null: train model.architecture from scratch",
    )
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="type of the arithmetic; auto: float32 on CPU, bfloat16 elsewhere"
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="type in which models that do not train (reference, reward model) are stored; auto: compute_dtype",
    )
    remat: Literal["none", "dots", "full"] = Field(
        default="dots",
        description="what the backward pass recomputes. none: nothing; dots: all but matrix products; full: whole "
        "layers (least memory, most time)",
    )
    attention: Literal["auto", "blocked", "xla", "cudnn"] = Field(
        default="auto",
        description="attention in training and scoring. auto: blocked, which skips keys that no query can see; xla: "
        "the plain reference; cudnn: NVIDIA GPUs only",
    )
    logit_chunk: int = Field(
        default=1024,
        gt=0,
        description="tokens per device whose logits are in memory at a time; lower it to save memory",
    )
