"""A decoder without its parameters: sizes, and what may differ from layer to layer."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "gelu"]
Norm = Literal["rms", "rms_offset", "layer"]
NormPlaces = Literal["before", "after", "around"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-trained length.

    Attributes:
      kind: linear divides every frequency by `factor`; llama3 divides those of long wavelength, leaves those of short
        wavelength, and blends between (Llama 3.1); yarn does so too, with a blend that is linear in the frequency's
        index (arXiv:2309.00071); dynamic stretches rows that are longer than the model's positions, and none is.
      factor: of the stretch.
      low, high: llama3 and yarn blend where original_positions / wavelength is between them; 1 and 32 in yarn's paper.
      original_positions: llama3's and yarn's pre-trained length, tokens.
      attention_factor: yarn's factor of rotated queries and keys.
      truncate: yarn's blend begins and ends at whole indices.
    """

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ between layers of the same sizes, and between families.

    Attributes:
      window: tokens that a token sees, itself included, counted by position (Mistral 0.1); None: all.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None: frequencies as pre-trained.
      rope_fraction: the part of a head, from its first component on, that is rotated (GPT-NeoX: a quarter).
      qkv_bias: biases on queries, keys and values (Qwen2).
      output_bias: a bias on attention's output (GPT-NeoX).
      mlp_bias: biases on both of the MLP's products (GPT-NeoX); the MLP must be ungated.
      qk_norm: RMS norm of every query and key head before the rotation (Qwen3).
      qk_norm_joint: that norm is of all heads together (OLMo 2).
      scale: factor of the attention logits; None: 1 / sqrt(head_dim).
      soft_cap: attention logits x, scaled, become soft_cap * tanh(x / soft_cap) (Gemma 2); None: no cap.
      activation: of the MLP's gate: silu, gelu_tanh, the tanh approximation of GELU (Gemma), or gelu, the exact one.
      gated: the MLP is down(activation(gate(x)) * up(x)); False: down(activation(up(x))) (GPT-NeoX).
      norm_places: before: attention and MLP read normed inputs; after: what they add to the residual stream is normed
        instead (OLMo 2); around: both (Gemma 2).
      parallel: attention and MLP read the same residual stream, and both are added to it (GPT-NeoX).
    """

    window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_fraction: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    activation: Activation = "silu"
    gated: bool = True
    norm_places: NormPlaces = "before"
    parallel: bool = False

    def __post_init__(self):
        if self.gated and self.mlp_bias:
            raise ValueError("mlp_bias=True needs gated=False: a gated MLP has no biases")
        if self.qk_norm_joint and not self.qk_norm:
            raise ValueError("qk_norm_joint=True needs qk_norm=True: it says what that norm is of")


PARAMETER_FIELDS = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "qk_norm_joint", "gated", "norm_places")
"""Fields of a LayerSpec that decide which parameters a layer has. All layers are one stack, so they must agree."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and layers of one model; hashable, so that it can be a static argument. Names follow transformers.

    Attributes:
      family: transformers' model_type, by which the model is exported.
      pattern: layer i is pattern[i % len(pattern)]; the last repetition may be cut off.
      norm: rms: x / rms(x) * scale; rms_offset: x / rms(x) * (1 + scale) (Gemma); layer: (x - mean(x)) / std(x) * scale
        + bias (GPT-NeoX).
      scale_embedding: token embeddings are multiplied by sqrt(hidden_size) (Gemma).
      final_soft_cap: next-token logits x become final_soft_cap * tanh(x / final_soft_cap) (Gemma 2); None: no cap.

    Raises:
      ValueError: an empty pattern, one longer than the model, or one whose layers differ in parameters.
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
    norm: Norm = "rms"
    scale_embedding: bool = False
    final_soft_cap: float | None = None

    def __post_init__(self):
        if not self.pattern:
            raise ValueError("pattern is empty: it needs at least one LayerSpec")
        if len(self.pattern) > max(self.num_layers, 1):
            raise ValueError(f"the pattern's {len(self.pattern)} layers are more than num_layers={self.num_layers}")
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
    """The shortest prefix of `layers` whose repetition, cut off where they end, gives all of them."""
    whole = tuple(layers)
    repeats = (n for n in range(1, len(whole)) if whole[n:] == whole[: len(whole) - n])
    return whole[: next(repeats, len(whole))]
