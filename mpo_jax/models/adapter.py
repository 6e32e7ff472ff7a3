"""Low-rank adapters: W x becomes W x + (alpha / r) B A x, of which only A and B train. LoRA, arXiv:2106.09685.

An adapted kernel `q` has the leaves `q_lora.a` and `q_lora.b` beside it, in one tree with the kernels they change. A is
uniform in +-1/sqrt(fan_in), as PEFT draws it, and B is zero, so a new adapter changes no bit of the model.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mpo_jax.config.schema import AdapterConfig
from mpo_jax.errors import UserError
from mpo_jax.models import quantised
from mpo_jax.models.kernels import KERNELS, MODULES
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.types import Head, Params, Tree

SUFFIX = "_lora"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What stays fixed about a model's adapter; hashable.

    Attributes:
      rank: inner dimension of B A.
      alpha: numerator of the factor of B A.
      targets: names of the adapted kernels, keys of `KERNELS`.
      rslora: whether the factor is alpha / sqrt(rank) (arXiv:2312.03732) instead of alpha / rank.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @classmethod
    def of(cls, config: AdapterConfig, decoder: DecoderConfig) -> "Adapter":
        """From a configuration's `model.adapter`, for the kernels that the model's layers have.

        Raises:
          UserError: if one that the configuration names is not among them.
        """
        absent = {"gate"} if not decoder.pattern[0].gated else set()
        if not isinstance(config.targets, str) and (missing := absent & set(config.kernels)):
            raise UserError(
                f"model.adapter.targets names {min(missing)}_proj, but the layers of a {decoder.family} model have none"
            )
        targets = tuple(kernel for kernel in config.kernels if kernel not in absent)
        return cls(config.rank, config.alpha, targets, config.rslora)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init(adapter: Adapter, layers: Tree, key: Array) -> Tree:
    """Fresh float32 adapters of a stack of layers (arrays or shapes), as a tree to be merged with the model's.

    Raises:
      ValueError: if a target is not among the layers' kernels.
    """
    found: Tree = {}
    for number, (name, (module, inputs, _)) in enumerate(KERNELS.items()):
        if name not in adapter.targets:
            continue
        if name not in layers[module]:
            raise ValueError(f"the layers have no kernel {module}.{name} to adapt")
        depth, fan_in, fan_out = _sides(layers[module][name].shape, inputs)
        bound = 1.0 / math.sqrt(math.prod(fan_in))
        shape = (depth, *fan_in, adapter.rank)
        a = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        b = jnp.zeros((depth, adapter.rank, *fan_out), jnp.float32)
        found.setdefault(module, {})[name + SUFFIX] = {"a": a, "b": b}
    return {"layers": found}


def _sides(shape: tuple[int, ...], inputs: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The layers, the input axes and the output axes of a stacked kernel."""
    return shape[0], shape[1 : 1 + inputs], shape[1 + inputs :]


def split(tree: Tree, adapter: Tree, head: Head) -> Params:
    """A model whose adapter trains, and its value head if it has one; all else is frozen."""
    trained = {**adapter, "score": tree["score"]} if head == "value" else adapter
    rest = {name: leaf for name, leaf in tree.items() if name not in trained or name == "layers"}
    return {"trainable": trained, "frozen": rest}


def has_adapter(layers: Tree) -> bool:
    """Whether there are adapters among the leaves of a layer or a stack of them."""
    return any(name.endswith(SUFFIX) for module in MODULES for name in layers[module])


def folded(tree: Tree, adapter: Adapter, dtype: str) -> Tree:
    """The model without adapters: each kernel is W + scale B A, summed in float32 and rounded to W's type.

    Args:
      tree: all parameters, layers stacked; without adapters it comes back as it is.
      dtype: of kernels that are stored as int8, for which a sum has no type.
    """
    layers = quantised.restored(dict(tree["layers"]), dtype)
    for module in MODULES:
        leaves = dict(layers[module])
        for name in [name for name in leaves if name.endswith(SUFFIX)]:
            low, kernel = leaves.pop(name), name.removesuffix(SUFFIX)
            leaves[kernel] = _folded(leaves[kernel], low["a"], low["b"], adapter.scale)
        layers[module] = leaves
    return {**tree, "layers": layers}


def _folded(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    depth, rank = b.shape[0], b.shape[1]
    product = jnp.einsum(
        "lir,lro->lio",
        a.reshape(depth, -1, rank).astype(jnp.float32),
        b.reshape(depth, rank, -1).astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def axes(kernels: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Logical axes of all adapters' leaves by dotted path, from those of the kernels: the rank is never divided."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, (module, inputs, _) in KERNELS.items():
        path = f"layers.{module}.{name}"
        depth, fan_in, fan_out = kernels[path][:1], kernels[path][1 : 1 + inputs], kernels[path][1 + inputs :]
        found |= {f"{path}{SUFFIX}.a": (*depth, *fan_in, None), f"{path}{SUFFIX}.b": (*depth, None, *fan_out)}
    return found
