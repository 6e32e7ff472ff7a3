"""The sections `model` and `model.architecture`."""

from typing import Literal, TypeAlias

from pydantic import Field, field_validator

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


Kernel: TypeAlias = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION: tuple[Kernel, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: tuple[Kernel, ...] = ("gate_proj", "up_proj", "down_proj")


class AdapterConfig(Section, frozen=True):
    """Low-rank adapters (LoRA) that train in place of a pretrained model. Names follow PEFT."""

    rank: int = Field(default=16, gt=0, description="rank r of every update B A")
    alpha: float = Field(default=32.0, gt=0, description="the update's factor is alpha / r")
    targets: Literal["attention", "mlp", "all"] | tuple[Kernel, ...] = Field(
        default="all",
        description="matrices that get an adapter: attention's four, the MLP's three, all seven, or a list of "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    )
    rslora: bool = Field(default=False, description="the factor is alpha / sqrt(r), which suits high ranks")

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: "str | tuple[Kernel, ...]") -> "str | tuple[Kernel, ...]":
        if not targets:
            raise ValueError("the list is empty: name at least one matrix")
        return targets

    @property
    def kernels(self) -> tuple[str, ...]:
        """The adapted matrices by their names here: `q` for `q_proj`."""
        chosen = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}.get(str(self.targets), self.targets)
        return tuple(name.removesuffix("_proj") for name in ATTENTION + MLP if name in chosen)


class ModelConfig(Section, frozen=True):
    """The base model, and how it computes."""

    path: str | None = Field(
        default=None,
        description="base model: Hugging Face folder, .gguf file, or hub id (org/name, org/name@revision); "
        "null: train model.architecture from scratch",
    )
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    adapter: AdapterConfig | None = Field(
        default=None,
        description="train low-rank adapters on frozen models instead of whole models; null: whole models. A stage "
        "that starts from random weights, such as SFT from scratch, trains them whole whatever this says",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="type of the arithmetic; auto: float32 on CPU, bfloat16 elsewhere"
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="type in which models that do not train (reference, reward model, models under adapters) are "
        "stored; auto: compute_dtype; int8: the layers' matrices with a scale a column, all else in compute_dtype",
    )
    remat: Literal["none", "dots", "full"] = Field(
        default="dots",
        description="what the backward pass recomputes. none: nothing; dots: all but matrix products; full: whole "
        "layers (least memory, most time)",
    )
    attention: Literal["auto", "blocked", "pallas", "xla", "cudnn"] = Field(
        default="auto",
        description="attention in training and scoring. auto: pallas on TPUs where rows fit, blocked elsewhere; "
        "blocked: skips keys that no query can see; pallas: kernels that do so and hold no scores in memory, for TPUs "
        "and NVIDIA GPUs (a CPU interprets them, slowly); xla: the plain reference; cudnn: NVIDIA GPUs only",
    )
    logit_chunk: int = Field(
        default=1024,
        gt=0,
        description="tokens per device whose logits are in memory at a time; lower it to save memory",
    )
