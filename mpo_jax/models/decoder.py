"""The decoder: Flax NNX modules of the Llama family. Only this package imports Flax.

Layers are stacked along a leading axis and scanned, so that a module here is one layer, and the compile time does not
grow with depth. Letters: B batch, T query token, S key token, D model, H heads, G kv heads, K head dim, F feed-forward.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.models import adapter, quantised
from mpo_jax.models.adapter import SUFFIX, Adapter
from mpo_jax.models.attention import Attend, logit_scale, soft_capped
from mpo_jax.models.kernels import KERNELS
from mpo_jax.models.spec import Activation, DecoderConfig, LayerSpec
from mpo_jax.runtime.sharding import constrain


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> Array:
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


def linear(x: Float[Array, "*T D"], kernel: Float[Array, "D ..."]) -> Array:
    """x times kernel over x's last and the kernel's first axis, in x's dtype, as one matrix product.

    With the token axes folded into one, the kernel's gradient contracts one axis in place; over two axes XLA's CPU
    backend writes out transposed copies first, which made a training step three times slower.
    """
    rows = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype).reshape(kernel.shape[0], -1)
    return rows.reshape(*x.shape[:-1], *kernel.shape[1:])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32. arXiv:1910.07467."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        x32 = x.astype(jnp.float32)
        norm = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (norm * along_last(self.scale[...].astype(jnp.float32), x)).astype(x.dtype)


def along_last(weight: Array, x: Array) -> Array:
    """`weight` with leading axes of size one, as many as it takes to meet the last axes of `x`."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


def rope_frequencies(spec: LayerSpec, head_dim: int) -> np.ndarray:
    """[K/2] radians a position, float32: theta^(-2i/K), stretched as `rope_scaling` says."""
    inverse = spec.rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None:
        turns = scaling.original_positions * inverse / (2 * np.pi)
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        inverse = kept * inverse + (1.0 - kept) * inverse / scaling.factor
    return inverse.astype(np.float32)


def rope_tables(spec: LayerSpec, head_dim: int, position_BT: Int[Array, "B T"]) -> tuple[Array, Array]:
    """cos and sin [B T K/2] of the rotary embedding, float32. arXiv:2104.09864, halves convention."""
    frequency = jnp.asarray(rope_frequencies(spec, head_dim))
    angle = position_BT.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T H K"], cos: Float[Array, "B T k"], sin: Float[Array, "B T k"]) -> Array:
    """Rotates the two halves of each head, computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class LowRank(nnx.Module):
    """What an adapter adds to a kernel's output: scale (x A) B, with A [in r] and B [r out]."""

    def __init__(self, scale: float):
        # parameters come from `adapter.init`: a module of this class is only merged with them
        self.a, self.b = nnx.Param(jnp.zeros((0, 0))), nnx.Param(jnp.zeros((0, 0)))
        self.scale = scale

    def __call__(self, x: Float[Array, "*T D"]) -> Array:
        a = self.a[...]
        return self.scale * linear(linear(x, a.reshape(-1, a.shape[-1])), self.b[...])


class Adapted(nnx.Module):
    """A module of kernels, some of which have an adapter beside them: `q_lora` for `q`."""

    def adapt(self, module: str, adapted: Adapter | None) -> None:
        """Makes a place for the adapters of this module's kernels."""
        if adapted is None:
            return
        for name in adapted.targets:
            if KERNELS[name].module == module:
                setattr(self, name + SUFFIX, LowRank(adapted.scale))

    def plus(self, name: str, output: Array, x: Array) -> Array:
        """The kernel's output for `x`, with what its adapter adds, if it has one."""
        low = getattr(self, name + SUFFIX, None)
        return output if low is None else output + low(x)


class Attention(Adapted):
    """Grouped-query self-attention; `fused` has one kernel [D G R+2 K] of each group's R queries, key and value."""

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        adapted: Adapter | None = None,
    ):
        c = config
        out_std = c.init_std / (2 * c.num_layers) ** 0.5
        if fused:
            group = c.num_heads // c.num_kv_heads + 2
            self.qkv = nnx.Param(normal(rngs, (c.hidden_size, c.num_kv_heads, group, c.head_dim), c.init_std))
        else:
            self.q = nnx.Param(normal(rngs, (c.hidden_size, c.num_heads, c.head_dim), c.init_std))
            self.k = nnx.Param(normal(rngs, (c.hidden_size, c.num_kv_heads, c.head_dim), c.init_std))
            self.v = nnx.Param(normal(rngs, (c.hidden_size, c.num_kv_heads, c.head_dim), c.init_std))
        self.o = nnx.Param(normal(rngs, (c.num_heads, c.head_dim, c.hidden_size), out_std))
        if spec.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((c.num_heads, c.head_dim), jnp.float32))
            self.k_bias = nnx.Param(jnp.zeros((c.num_kv_heads, c.head_dim), jnp.float32))
            self.v_bias = nnx.Param(jnp.zeros((c.num_kv_heads, c.head_dim), jnp.float32))
        if spec.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.spec, self.fused = spec, fused
        self.adapt("attention", adapted)

    def project(self, x: Float[Array, "B T D"], cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Rotated queries [B T H K] and keys [B T G K], and values [B T G K]."""
        if self.fused:
            together = linear(x, self.qkv[...])
            q = rearrange(together[..., :-2, :], "b t g r k -> b t (g r) k")
            k, v = together[..., -2, :], together[..., -1, :]
        else:
            kernels = {"q": self.q, "k": self.k, "v": self.v}
            q, k, v = (self.plus(name, linear(x, kernel[...]), x) for name, kernel in kernels.items())
        if self.spec.qkv_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (y + along_last(b[...].astype(y.dtype), y) for y, b in zip((q, k, v), biases, strict=True))
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def output(self, heads: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        joined = rearrange(heads, "b t h k -> b t (h k)")
        return self.plus("o", linear(joined, rearrange(self.o[...], "h k d -> (h k) d")), joined)


def gelu_tanh(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). arXiv:1606.08415."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu_tanh": gelu_tanh}


class MLP(Adapted):
    """down(activation(gate(x)) * up(x)): SwiGLU with SiLU, GeGLU with GELU. arXiv:2002.05202.

    `fused` has one kernel [D 2 F] of gate and up.
    """

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        adapted: Adapter | None = None,
    ):
        c = config
        self.spec, self.fused = spec, fused
        self.adapt("mlp", adapted)
        if fused:
            self.gate_up = nnx.Param(normal(rngs, (c.hidden_size, 2, c.intermediate_size), c.init_std))
        else:
            self.gate = nnx.Param(normal(rngs, (c.hidden_size, c.intermediate_size), c.init_std))
            self.up = nnx.Param(normal(rngs, (c.hidden_size, c.intermediate_size), c.init_std))
        self.down = nnx.Param(
            normal(rngs, (c.intermediate_size, c.hidden_size), c.init_std / (2 * c.num_layers) ** 0.5)
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.fused:
            # `linear` would fold the kernel's last two axes, of which a tensor axis divides the second: a gather
            rows = jnp.tensordot(x.reshape(-1, x.shape[-1]), self.gate_up[...].astype(x.dtype), 1)
            together = rows.reshape(*x.shape[:-1], *rows.shape[1:])
            gate, up = together[..., 0, :], together[..., 1, :]
        else:
            kernels = {"gate": self.gate, "up": self.up}
            gate, up = (self.plus(name, linear(x, kernel[...]), x) for name, kernel in kernels.items())
        inner = ACTIVATIONS[self.spec.activation](gate) * up
        return self.plus("down", linear(inner, self.down[...]), inner)


class Block(nnx.Module):
    """One layer: pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        adapted: Adapter | None = None,
    ):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, spec, rngs=rngs, fused=fused, adapted=adapted)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, spec, rngs=rngs, fused=fused, adapted=adapted)

    def full(self, x: Array, cos: Array, sin: Array, attend: Attend) -> Any:
        """The layer over whole rows; returns x and the keys and values [B T G K] for a cache."""
        q, k, v = self.attention.project(self.attention_norm(x), cos, sin)
        q = constrain(q, "batch", None, "act_heads", None)
        x = x + self.attention.output(attend(q, k, v))
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", None, None), (k, v)

    def cached(
        self,
        x_B1D: Array,
        cos: Array,
        sin: Array,
        stored: tuple[tuple[Float[Array, "B G S K"], Float[Array, "B G S K"]], ...],
        recent: tuple[Float[Array, "B G C K"], Float[Array, "B G C K"]],
        visible_BT: Bool[Array, "B T"],
        slot: Array,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The layer over one new token a row, which is written to `recent` at `slot` first; returns x and `recent`.

        Keys and values of earlier tokens are read from the parts of `stored`, which stay as they are, and from
        `recent`. T counts the slots of all parts in order, then those of `recent`. Trailing parts may be missing where
        no row sees their slots. Every part has products of its own, so a missing part adds 0 and changes no bit.
        """
        q, k, v = self.attention.project(self.attention_norm(x_B1D), cos, sin)
        write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            cache, rearrange(new, "b 1 g k -> b g 1 k").astype(cache.dtype), slot, 2
        )
        recent = write(recent[0], k), write(recent[1], v)
        spec = self.attention.spec
        q_BGRK = rearrange(q, "b 1 (g r) k -> b g r k", g=k.shape[2])
        scores = [
            jnp.einsum("bgrk,bgsk->bgrs", q_BGRK, keys, preferred_element_type=jnp.float32)
            for keys, _ in (*stored, recent)
        ]
        missing = visible_BT.shape[1] - sum(x.shape[-1] for x in scores)
        if missing:
            scores.insert(-1, jnp.zeros((*scores[0].shape[:-1], missing), jnp.float32))
        scale, lowest = logit_scale(spec.scale, q.shape[-1]), jnp.finfo(jnp.float32).min
        logits = soft_capped(jnp.concatenate(scores, -1) * scale, spec.soft_cap)
        logits = jnp.where(visible_BT[:, None, None], logits, lowest)
        if len(scores) > 2:
            # the softmax must be compiled alike whatever is missing
            logits = jax.lax.optimization_barrier(logits)
        weights = jax.nn.softmax(logits, -1).astype(x_B1D.dtype)
        parts = jnp.split(weights, np.cumsum([x.shape[-1] for x in scores])[:-1].tolist(), -1)
        if missing:
            del parts[-2]
        read = [
            jnp.einsum("bgrs,bgsk->bgrk", part, values.astype(x_B1D.dtype))
            for part, (_, values) in zip(parts, (*stored, recent), strict=True)
        ]
        total = sum(read[1:], read[0])
        x_B1D = x_B1D + self.attention.output(rearrange(total, "b g r k -> b 1 (g r) k"))
        x_B1D = x_B1D + self.mlp(self.mlp_norm(x_B1D))
        return x_B1D, recent


def fuse(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's parameters for a `fused` block: fewer, larger products, which few tokens at a time need.

    The kernels of a group of heads stay together, and gate and up keep their feed-forward axis, so that a tensor axis
    divides them as before.
    """
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    q, k, v = (attention.pop(name) for name in "qkv")
    queries = rearrange(q, "d (g r) k -> d g r k", g=k.shape[1])
    attention["qkv"] = jnp.concatenate([queries, k[:, :, None], v[:, :, None]], 2)
    mlp["gate_up"] = jnp.stack([mlp.pop("gate"), mlp.pop("up")], 1)
    return {**layer, "attention": attention, "mlp": mlp}


class Trunk(nnx.Module):
    """All that is not a layer: token embedding, final norm, and the language-model head where it is not tied."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.embedding = nnx.Param(normal(rngs, (c.vocab_size, c.hidden_size), c.init_std))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        if not c.tie_embeddings:
            self.head = nnx.Param(normal(rngs, (c.hidden_size, c.vocab_size), c.init_std))

    def embed(self, ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        # gathered first: from a table divided along D the partitioner would replicate the activations' gradient
        return constrain(self.embedding[...].astype(dtype), "vocab", None)[ids]


class ValueHead(nnx.Module):
    """Linear(hidden, 1) without bias, read as float32; zero at the start so that all scores start equal."""

    def __init__(self, config: DecoderConfig):
        self.kernel = nnx.Param(jnp.zeros((config.hidden_size, 1), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return jnp.einsum("btd,do->bto", x.astype(jnp.float32), self.kernel[...].astype(jnp.float32))[..., 0]


PARAM_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "norm.scale": (None,),
    "layers.attention_norm.scale": (None, None),
    "layers.attention.q": (None, "embed", "heads", None),
    "layers.attention.k": (None, "embed", "kv_heads", None),
    "layers.attention.v": (None, "embed", "kv_heads", None),
    "layers.attention.o": (None, "heads", None, "embed"),
    "layers.attention.q_bias": (None, "heads", None),
    "layers.attention.k_bias": (None, "kv_heads", None),
    "layers.attention.v_bias": (None, "kv_heads", None),
    "layers.attention.q_norm.scale": (None, None),
    "layers.attention.k_norm.scale": (None, None),
    "layers.mlp_norm.scale": (None, None),
    "layers.mlp.gate": (None, "embed", "mlp"),
    "layers.mlp.up": (None, "embed", "mlp"),
    "layers.mlp.down": (None, "mlp", "embed"),
    "score.kernel": (None, None),
}
PARAM_AXES |= adapter.axes(PARAM_AXES) | quantised.axes(PARAM_AXES)
"""Logical axes of every parameter, by dotted path; layers lead with the stacked axis."""

FLOAT32 = ("scale", "score.kernel")
"""Endings of the paths of parameters that enter the arithmetic as float32, and so are stored as that in every model."""
