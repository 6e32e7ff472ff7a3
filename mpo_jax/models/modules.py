"""NNX modules made of plain parameters: the one place where both are merged, inside jit.

Graph definitions are kept for each kind of module, so that a trace builds none twice and no array is made for them.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from mpo_jax.models import adapter, quantised
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.decoder import Block, Trunk, ValueHead
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.types import Tree

if TYPE_CHECKING:
    from mpo_jax.models.forward import Model


def trunk(model: "Model", params: Tree) -> Trunk:
    """What is before and behind the layers: embedding, last norm, and the head where it is not tied."""
    names = ("embedding", "norm") if model.decoder.tie_embeddings else ("embedding", "norm", "head")
    # a model with a value head has no language-model head; an empty stand-in keeps one graph definition for both
    parts = {name: params.get(name, jnp.zeros((0, 0))) for name in names}
    return nnx.merge(_trunk_graph(model.decoder), parts)


def block(model: "Model", spec: LayerSpec, layer_params: Tree, *, fused: bool = False) -> Block:
    """A layer, with its adapter if the parameters have one.

    Args:
      layer_params: of one layer, without the leading axis of the stack.
      fused: whether the kernels are those that `decoder.fuse` makes for decoding.
    """
    adapted = model.adapter if adapter.has_adapter(layer_params) else None
    layer_params = quantised.restored(layer_params, model.dtype)
    return nnx.merge(_block_graph(model.decoder, spec, adapted, fused=fused), layer_params)


def value_head(model: "Model", params: Tree) -> ValueHead:
    """The value head of a reward model or critic.

    Raises:
      KeyError: if the parameters are a language model's.
    """
    return nnx.merge(_value_graph(model.decoder), params["score"])


@lru_cache
def _trunk_graph(config: DecoderConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: Trunk(config, rngs=nnx.Rngs(0))))


@lru_cache
def _value_graph(config: DecoderConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: ValueHead(config)))


@lru_cache
def _block_graph(config: DecoderConfig, spec: LayerSpec, adapted: Adapter | None, *, fused: bool) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: Block(config, spec, rngs=nnx.Rngs(0), fused=fused, adapted=adapted)))
