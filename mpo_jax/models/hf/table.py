"""The one table of tensors: each parameter's names in Hugging Face folders and GGUF files, and both layouts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mpo_jax.models.spec import DecoderConfig

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor there, the dotted paths of the parameters here that it holds, and the two ways between the layouts.

    `{i}` in a name is the layer. Both functions act on one layer's arrays, in the order of `paths`. GGUF tensors come
    in Hugging Face's layout.

    Attributes:
      gguf: None where no GGUF file with such a tensor is read.
      families: whose models name or lay out these parameters so; None: those that have no entry of their own.
    """

    paths: tuple[str, ...]
    name: str
    gguf: str | None
    to_ours: Callable[[np.ndarray, DecoderConfig], Arrays]
    to_theirs: Callable[[Arrays, DecoderConfig], np.ndarray]
    families: tuple[str, ...] | None = None

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name

    def their_shape(self, shapes: Sequence[tuple[int, ...]], config: DecoderConfig) -> tuple[int, ...]:
        """The shape there of one layer's arrays that have these shapes here."""
        return self.to_theirs(tuple(np.empty(shape, np.bool_) for shape in shapes), config).shape


def _same(path: str, name: str, gguf: str | None) -> Entry:
    return Entry((path,), name, gguf, lambda w, c: (w,), lambda ws, c: ws[0])


def _transposed(path: str, name: str, gguf: str | None) -> Entry:
    return Entry((path,), name, gguf, lambda w, c: (w.T,), lambda ws, c: ws[0].T)


def _heads_out(path: str, name: str, gguf: str | None) -> Entry:
    """[heads * K, D] there, [D, heads, K] here."""
    return Entry(
        (path,),
        name,
        gguf,
        lambda w, c: (w.T.reshape(w.shape[1], -1, c.head_dim),),
        lambda ws, c: ws[0].reshape(len(ws[0]), -1).T,
    )


def _heads_in(path: str, name: str, gguf: str | None) -> Entry:
    """[D, heads * K] there, [heads, K, D] here."""
    return Entry(
        (path,),
        name,
        gguf,
        lambda w, c: (w.T.reshape(-1, c.head_dim, len(w)),),
        lambda ws, c: ws[0].reshape(-1, ws[0].shape[-1]).T,
    )


def _heads_bias(path: str, name: str, gguf: str | None) -> Entry:
    """[heads * K] there, [heads, K] here."""
    return Entry((path,), name, gguf, lambda w, c: (w.reshape(-1, c.head_dim),), lambda ws, c: ws[0].reshape(-1))


def _fused_heads(paths: tuple[str, str, str], name: str) -> Entry:
    """[heads * 3 * K, D] there, each head's query, key and value together; [D, heads, K] here, each."""

    def to_ours(w: np.ndarray, c: DecoderConfig) -> Arrays:
        heads = w.reshape(-1, 3, c.head_dim, w.shape[-1])
        return tuple(np.moveaxis(heads[:, part], -1, 0) for part in range(3))

    def to_theirs(ws: Arrays, c: DecoderConfig) -> np.ndarray:
        return np.stack([np.moveaxis(w, 0, -1) for w in ws], 1).reshape(-1, len(ws[0]))

    return Entry(paths, name, None, to_ours, to_theirs)


def _fused_bias(paths: tuple[str, str, str], name: str) -> Entry:
    """[heads * 3 * K] there, [heads, K] here, each."""
    return Entry(
        paths,
        name,
        None,
        lambda w, c: tuple(w.reshape(-1, 3, c.head_dim).swapaxes(0, 1)),
        lambda ws, c: np.stack(ws, 1).reshape(-1),
    )


def _of(families: tuple[str, ...], *own: Entry) -> tuple[Entry, ...]:
    """Entries of these families alone."""
    return tuple(replace(entry, families=families) for entry in own)


_LAYER, _BLK, _NEOX = "model.layers.{i}.", "blk.{i}.", "gpt_neox.layers.{i}."
TABLE = (
    _same("embedding", "model.embed_tokens.weight", "token_embd.weight"),
    _same("norm.scale", "model.norm.weight", "output_norm.weight"),
    _transposed("head", "lm_head.weight", "output.weight"),
    _transposed("score.kernel", "score.weight", "cls.output.weight"),
    _same("layers.attention_norm.scale", _LAYER + "input_layernorm.weight", _BLK + "attn_norm.weight"),
    _heads_out("layers.attention.q", _LAYER + "self_attn.q_proj.weight", _BLK + "attn_q.weight"),
    _heads_out("layers.attention.k", _LAYER + "self_attn.k_proj.weight", _BLK + "attn_k.weight"),
    _heads_out("layers.attention.v", _LAYER + "self_attn.v_proj.weight", _BLK + "attn_v.weight"),
    _heads_in("layers.attention.o", _LAYER + "self_attn.o_proj.weight", _BLK + "attn_output.weight"),
    _heads_bias("layers.attention.q_bias", _LAYER + "self_attn.q_proj.bias", _BLK + "attn_q.bias"),
    _heads_bias("layers.attention.k_bias", _LAYER + "self_attn.k_proj.bias", _BLK + "attn_k.bias"),
    _heads_bias("layers.attention.v_bias", _LAYER + "self_attn.v_proj.bias", _BLK + "attn_v.bias"),
    _same("layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight", _BLK + "attn_q_norm.weight"),
    _same("layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight", _BLK + "attn_k_norm.weight"),
    _same("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", _BLK + "ffn_norm.weight"),
    _transposed("layers.mlp.gate", _LAYER + "mlp.gate_proj.weight", _BLK + "ffn_gate.weight"),
    _transposed("layers.mlp.up", _LAYER + "mlp.up_proj.weight", _BLK + "ffn_up.weight"),
    _transposed("layers.mlp.down", _LAYER + "mlp.down_proj.weight", _BLK + "ffn_down.weight"),
    _same("layers.attention_post_norm.scale", _LAYER + "post_attention_layernorm.weight", None),
    _same("layers.mlp_post_norm.scale", _LAYER + "post_feedforward_layernorm.weight", None),
    *_of(
        ("gemma2", "gemma3_text"),
        _same("layers.mlp_norm.scale", _LAYER + "pre_feedforward_layernorm.weight", None),
    ),
    *_of(
        ("gpt_neox",),
        _same("embedding", "gpt_neox.embed_in.weight", None),
        _same("norm.scale", "gpt_neox.final_layer_norm.weight", None),
        _same("norm.bias", "gpt_neox.final_layer_norm.bias", None),
        _transposed("head", "embed_out.weight", None),
        _same("layers.attention_norm.scale", _NEOX + "input_layernorm.weight", None),
        _same("layers.attention_norm.bias", _NEOX + "input_layernorm.bias", None),
        _fused_heads(
            ("layers.attention.q", "layers.attention.k", "layers.attention.v"),
            _NEOX + "attention.query_key_value.weight",
        ),
        _fused_bias(
            ("layers.attention.q_bias", "layers.attention.k_bias", "layers.attention.v_bias"),
            _NEOX + "attention.query_key_value.bias",
        ),
        _heads_in("layers.attention.o", _NEOX + "attention.dense.weight", None),
        _same("layers.attention.o_bias", _NEOX + "attention.dense.bias", None),
        _same("layers.mlp_norm.scale", _NEOX + "post_attention_layernorm.weight", None),
        _same("layers.mlp_norm.bias", _NEOX + "post_attention_layernorm.bias", None),
        _transposed("layers.mlp.up", _NEOX + "mlp.dense_h_to_4h.weight", None),
        _same("layers.mlp.up_bias", _NEOX + "mlp.dense_h_to_4h.bias", None),
        _transposed("layers.mlp.down", _NEOX + "mlp.dense_4h_to_h.weight", None),
        _same("layers.mlp.down_bias", _NEOX + "mlp.dense_4h_to_h.bias", None),
    ),
)


@lru_cache
def entries(family: str) -> dict[str, Entry]:
    """The entry of every parameter that a model of this family may have, by path."""
    found = {path: entry for entry in TABLE if entry.families is None for path in entry.paths}
    own = [entry for entry in TABLE if family in (entry.families or ())]
    return found | {path: entry for entry in own for path in entry.paths}
