"""The decoder: Flax NNX modules, of which a LayerSpec says what they do. Only this package imports Flax.

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
from mpo_jax.models.rope import rotate
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
    """x / rms(x) * scale, in float32; with `offset` scale is stored minus one. arXiv:1910.07467.

    Gemma stores its scales so. They are kept as they are, since one added and taken away again would round them.
    """

    def __init__(self, size: int, eps: float, *, offset: bool = False):
        self.scale = nnx.Param(jnp.full((size,), 0.0 if offset else 1.0, jnp.float32))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        x32, scale = x.astype(jnp.float32), self.scale[...].astype(jnp.float32)
        norm = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (norm * along_last(1.0 + scale if self.offset else scale, x)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias, in float32. arXiv:1607.06450."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, -1, keepdims=True)
        norm = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + self.eps)
        scale, bias = (along_last(leaf[...].astype(jnp.float32), x) for leaf in (self.scale, self.bias))
        return (norm * scale + bias).astype(x.dtype)


def make_norm(config: DecoderConfig, size: int) -> Any:
    """A norm of the model's kind over `size` components."""
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps)
    return RMSNorm(size, config.norm_eps, offset=config.norm == "rms_offset")


def along_last(weight: Array, x: Array) -> Array:
    """`weight` with leading axes of size one, as many as it takes to meet the last axes of `x`."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


def biased(x: Array, bias: Array) -> Array:
    """x plus a bias along its last axes, in x's dtype."""
    return x + along_last(bias.astype(x.dtype), x)


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
        if spec.output_bias:
            self.o_bias = nnx.Param(jnp.zeros((c.hidden_size,), jnp.float32))
        if spec.qk_norm:
            queries, keys = (c.num_heads, c.num_kv_heads) if spec.qk_norm_joint else (1, 1)
            self.q_norm = make_norm(c, queries * c.head_dim)
            self.k_norm = make_norm(c, keys * c.head_dim)
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
            q, k, v = (biased(y, b[...]) for y, b in zip((q, k, v), biases, strict=True))
        if self.spec.qk_norm_joint:
            q, k = over_all_heads(self.q_norm, q), over_all_heads(self.k_norm, k)
        elif self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def output(self, heads: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        joined = rearrange(heads, "b t h k -> b t (h k)")
        out = self.plus("o", linear(joined, rearrange(self.o[...], "h k d -> (h k) d")), joined)
        return biased(out, self.o_bias[...]) if self.spec.output_bias else out


def over_all_heads(norm: Callable[[Array], Array], x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """A norm of each token's heads together."""
    return norm(rearrange(x, "b t h k -> b t (h k)")).reshape(x.shape)


def gelu_tanh(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). arXiv:1606.08415."""
    return jax.nn.gelu(x, approximate=True)


def gelu(x: Array) -> Array:
    """x Phi(x), with the normal distribution's Phi. arXiv:1606.08415."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu, "gelu_tanh": gelu_tanh, "gelu": gelu,
}  # fmt: skip


class MLP(Adapted):
    """down(activation(gate(x)) * up(x)): SwiGLU with SiLU, GeGLU with GELU. arXiv:2002.05202.

    Where it is not gated, down(activation(up(x))). `fused` has one kernel [D 2 F] of gate and up.
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
        self.spec, self.fused = spec, fused and spec.gated
        self.adapt("mlp", adapted)
        if self.fused:
            self.gate_up = nnx.Param(normal(rngs, (c.hidden_size, 2, c.intermediate_size), c.init_std))
        else:
            if spec.gated:
                self.gate = nnx.Param(normal(rngs, (c.hidden_size, c.intermediate_size), c.init_std))
            self.up = nnx.Param(normal(rngs, (c.hidden_size, c.intermediate_size), c.init_std))
        self.down = nnx.Param(
            normal(rngs, (c.intermediate_size, c.hidden_size), c.init_std / (2 * c.num_layers) ** 0.5)
        )
        if spec.mlp_bias:
            self.up_bias = nnx.Param(jnp.zeros((c.intermediate_size,), jnp.float32))
            self.down_bias = nnx.Param(jnp.zeros((c.hidden_size,), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activation = ACTIVATIONS[self.spec.activation]
        if not self.spec.gated:
            return self._ungated(x, activation)
        if self.fused:
            # `linear` would fold the kernel's last two axes, of which a tensor axis divides the second: a gather
            rows = jnp.tensordot(x.reshape(-1, x.shape[-1]), self.gate_up[...].astype(x.dtype), 1)
            together = rows.reshape(*x.shape[:-1], *rows.shape[1:])
            gate, up = together[..., 0, :], together[..., 1, :]
        else:
            kernels = {"gate": self.gate, "up": self.up}
            gate, up = (self.plus(name, linear(x, kernel[...]), x) for name, kernel in kernels.items())
        inner = activation(gate) * up
        return self.plus("down", linear(inner, self.down[...]), inner)

    def _ungated(self, x: Array, activation: Callable[[Array], Array]) -> Array:
        up = self.plus("up", linear(x, self.up[...]), x)
        inner = activation(biased(up, self.up_bias[...]) if self.spec.mlp_bias else up)
        down = self.plus("down", linear(inner, self.down[...]), inner)
        return biased(down, self.down_bias[...]) if self.spec.mlp_bias else down


class Block(nnx.Module):
    """One layer: attention and MLP, each added to the residual stream, with norms where the spec has them."""

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        adapted: Adapter | None = None,
    ):
        if spec.norm_places != "after":
            self.attention_norm = make_norm(config, config.hidden_size)
            self.mlp_norm = make_norm(config, config.hidden_size)
        if spec.norm_places != "before":
            self.attention_post_norm = make_norm(config, config.hidden_size)
            self.mlp_post_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config, spec, rngs=rngs, fused=fused, adapted=adapted)
        self.mlp = MLP(config, spec, rngs=rngs, fused=fused, adapted=adapted)
        self.spec = spec

    def project(self, x: Float[Array, "B T D"], cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """What attention reads: `Attention.project` of the residual stream, normed where it is."""
        return self.attention.project(x if self.spec.norm_places == "after" else self.attention_norm(x), cos, sin)

    def add(self, x: Float[Array, "B T D"], heads: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """The residual stream x after the layer, given what each query read."""
        attended = self.attention.output(heads)
        if self.spec.norm_places != "before":
            attended = self.attention_post_norm(attended)
        read = x if self.spec.parallel else x + attended
        mlp = self.mlp(read if self.spec.norm_places == "after" else self.mlp_norm(read))
        if self.spec.norm_places != "before":
            mlp = self.mlp_post_norm(mlp)
        return x + attended + mlp if self.spec.parallel else read + mlp

    def full(self, x: Array, cos: Array, sin: Array, attend: Attend) -> Any:
        """The layer over whole rows; returns x and the keys and values [B T G K] for a cache."""
        q, k, v = self.project(x, cos, sin)
        q = constrain(q, "batch", None, "act_heads", None)
        return constrain(self.add(x, attend(q, k, v)), "batch", None, None), (k, v)

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
        q, k, v = self.project(x_B1D, cos, sin)
        write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            cache, rearrange(new, "b 1 g k -> b g 1 k").astype(cache.dtype), slot, 2
        )
        recent = write(recent[0], k), write(recent[1], v)
        spec = self.spec
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
        return self.add(x_B1D, rearrange(total, "b g r k -> b 1 (g r) k")), recent


def fuse(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's parameters for a `fused` block: fewer, larger products, which few tokens at a time need.

    The kernels of a group of heads stay together, and gate and up keep their feed-forward axis, so that a tensor axis
    divides them as before.
    """
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    q, k, v = (attention.pop(name) for name in "qkv")
    queries = rearrange(q, "d (g r) k -> d g r k", g=k.shape[1])
    attention["qkv"] = jnp.concatenate([queries, k[:, :, None], v[:, :, None]], 2)
    if "gate" in mlp:
        mlp["gate_up"] = jnp.stack([mlp.pop("gate"), mlp.pop("up")], 1)
    return {**layer, "attention": attention, "mlp": mlp}


class Trunk(nnx.Module):
    """All that is not a layer: token embedding, final norm, and the language-model head where it is not tied."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.embedding = nnx.Param(normal(rngs, (c.vocab_size, c.hidden_size), c.init_std))
        self.norm = make_norm(c, c.hidden_size)
        self.scale = c.hidden_size**0.5 if c.scale_embedding else None
        if not c.tie_embeddings:
            self.head = nnx.Param(normal(rngs, (c.hidden_size, c.vocab_size), c.init_std))

    def embed(self, ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        # gathered first: from a table divided along D the partitioner would replicate the activations' gradient
        x = constrain(self.embedding[...].astype(dtype), "vocab", None)[ids]
        # Gemma was trained with the scale rounded to the arithmetic's type
        return x if self.scale is None else x * jnp.asarray(self.scale, dtype)


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
    "norm.bias": (None,),
    "layers.attention_norm.scale": (None, None),
    "layers.attention_norm.bias": (None, None),
    "layers.attention_post_norm.scale": (None, None),
    "layers.attention.q": (None, "embed", "heads", None),
    "layers.attention.k": (None, "embed", "kv_heads", None),
    "layers.attention.v": (None, "embed", "kv_heads", None),
    "layers.attention.o": (None, "heads", None, "embed"),
    "layers.attention.q_bias": (None, "heads", None),
    "layers.attention.k_bias": (None, "kv_heads", None),
    "layers.attention.v_bias": (None, "kv_heads", None),
    "layers.attention.o_bias": (None, None),
    "layers.attention.q_norm.scale": (None, None),
    "layers.attention.k_norm.scale": (None, None),
    "layers.mlp_norm.scale": (None, None),
    "layers.mlp_norm.bias": (None, None),
    "layers.mlp_post_norm.scale": (None, None),
    "layers.mlp.gate": (None, "embed", "mlp"),
    "layers.mlp.up": (None, "embed", "mlp"),
    "layers.mlp.down": (None, "mlp", "embed"),
    "layers.mlp.up_bias": (None, "mlp"),
    "layers.mlp.down_bias": (None, None),
    "score.kernel": (None, None),
}
PARAM_AXES |= adapter.axes(PARAM_AXES) | quantised.axes(PARAM_AXES)
"""Logical axes of every parameter, by dotted path; layers lead with the stacked axis."""

FLOAT32 = ("scale", "norm.bias", "score.kernel")
"""Endings of the paths of parameters that enter the arithmetic as float32, and so are stored as that in every model."""
