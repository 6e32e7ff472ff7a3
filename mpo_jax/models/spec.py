"""A decoder without its parameters: sizes, and what may differ from layer to layer."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-trained length.

    Attributes:
      kind: linear divides every frequency by `factor`; llama3 divides those of long wavelength, leaves those of short
        wavelength, and blends between (Llama 3.1).
      factor: of the stretch.
      low, high: llama3 blends where original_positions / wavelength is between them.
      original_positions: llama3's pre-trained length, tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ between layers of the same sizes.

    Attributes:
      window: tokens that a token sees, itself included, counted by position (Mistral 0.1); None: all.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None: frequencies as pre-trained.
      qkv_bias: biases on queries, keys and values (Qwen2).
      qk_norm: RMS norm of every query and key head before the rotation (Qwen3).
      scale: factor of the attention logits; None: 1 / sqrt(head_dim).
      soft_cap: attention logits x, scaled, become soft_cap * tanh(x / soft_cap) (Gemma 2); None: no cap.
      activation: of the MLP's gate: silu, or gelu_tanh, the tanh approximation of GELU (Gemma).
    """

    window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    activation: Activation = "silu"


PARAMETER_FIELDS = ("qkv_bias", "qk_norm")
"""Fields of a LayerSpec that decide which parameters a layer has. All layers are one stack, so they must agree."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and layers of one model; hashable, so that it can be a static argument. Names follow transformers.

    Attributes:
      family: transformers' model_type, by which the model is exported.
      pattern: layer i is pattern[i % len(pattern)]; num_layers is a multiple of its length.

    Raises:
      ValueError: an empty pattern, one that does not divide num_layers, or one whose layers differ in parameters.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    family: str = "llama"
    pattern: tuple[LayerSpec, ...] = (LayerSpec(),)

    def __post_init__(self):
        if not self.pattern:
            raise ValueError("pattern is empty: it needs at least one LayerSpec")
        if len(self.pattern) > 1 and self.num_layers % len(self.pattern):
            raise ValueError(
                f"num_layers={self.num_layers} is not a multiple of the pattern's {len(self.pattern)} layers"
            )
        for name in PARAMETER_FIELDS:
            if len(values := {getattr(spec, name) for spec in self.pattern}) > 1:
                raise ValueError(
                    f"all layers of a pattern must agree on {name}, which decides their parameters; got {values}"
                )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The spec of every layer, in order."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))


def shortest_pattern(layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The shortest prefix of `layers` whose repetition gives all of them."""
    whole = tuple(layers)
    lengths = (n for n in range(1, len(whole)) if len(whole) % n == 0)
    return next((whole[:n] for n in lengths if whole[:n] * (len(whole) // n) == whole), whole)
