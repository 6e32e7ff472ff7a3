"""The sections `model` and `model.architecture`."""

from typing import Literal

from pydantic import Field

from mpo_jax.config.base import Section


class ArchitectureConfig(Section, frozen=True):
    """Sizes of a Llama trained from scratch; a checkpoint brings its own. `vocab_size` follows the tokenizer."""

    hidden_size: int = Field(default=64, gt=0)
    intermediate_size: int = Field(default=172, gt=0)
    num_layers: int = Field(default=2, gt=0)
    num_heads: int = Field(default=4, gt=0)
    num_kv_heads: int = Field(default=4, gt=0)
    head_dim: int = Field(default=16, gt=0)
    max_positions: int = Field(default=512, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_embeddings: bool = True
    init_std: float = Field(default=0.02, gt=0)


class ModelConfig(Section, frozen=True):
    """Which base model, and how its arithmetic runs."""

    path: str | None = Field(
        default=None,
        description="base model: Hugging Face folder, .gguf file or hub id (org/name, org/name@revision); "
        "absent: trained from scratch",
    )
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: float32 on CPU only"
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="storage of reference and reward model; auto: as compute_dtype"
    )
    remat: Literal["none", "dots", "full"] = Field(default="dots", description="what the backward pass computes again")
    attention: Literal["auto", "blocked", "xla", "cudnn"] = Field(
        default="auto", description="over whole rows; auto: blocked, which skips what the layout hides"
    )
    logit_chunk: int = Field(default=1024, gt=0, description="tokens a device whose logits exist at one time")
