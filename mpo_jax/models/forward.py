"""The functional seam: parameters are plain dicts outside, NNX modules are merged inside jit.

Parameters: {"embedding", "norm", "head"?, "layers": {... leading axis L}, "score"?: {"kernel"}}.
"""

import dataclasses
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.models import adapter, attention, modules, quantised
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.decoder import FLOAT32, PARAM_AXES, Block, Trunk, ValueHead, fuse
from mpo_jax.models.pattern import Remat, scan_layers, shared
from mpo_jax.models.rope import rope_tables
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.runtime.sharding import BATCH_AXES, constrain, replicated, shardings_for
from mpo_jax.selection import make_pair_scorer
from mpo_jax.types import Head, Params, PromptBatch, Tokens, Tree, merge, trainable


@dataclasses.dataclass(frozen=True)
class Model:
    """What stays fixed about a model while its parameters change; hashable, a static argument of jitted functions.

    Attributes:
      decoder: sizes and layers.
      dtype: of the arithmetic; losses, log-softmax, norms and scores are float32 whatever it is.
      remat: what the backward pass computes again: none, dots (keep matrix products), full (keep layer inputs).
      attention: blocked (attention.py), or an implementation of jax.nn.dot_product_attention.
      logit_chunk: tokens of the whole batch whose logits exist at one time.
      adapter: what trains in place of the whole model; parameters without adapters are read as they are.
    """

    decoder: DecoderConfig
    dtype: str = "float32"
    remat: Remat = "none"
    attention: str = "blocked"
    logit_chunk: int = 1024
    adapter: Adapter | None = None


def init_params(config: DecoderConfig, key: Array) -> Tree:
    """Fresh float32 parameters, normal with `init_std`, residual outputs scaled by 1 / sqrt(2 L)."""
    trunk_key, layers_key = jax.random.split(key)
    trunk = nnx.to_pure_dict(nnx.state(Trunk(config, rngs=nnx.Rngs(params=trunk_key)), nnx.Param))

    def init_layer(layer_key):
        block = Block(config, config.pattern[0], rngs=nnx.Rngs(params=layer_key))
        return nnx.to_pure_dict(nnx.state(block, nnx.Param))

    return {**trunk, "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers))}


def with_score_head(params: Tree, config: DecoderConfig) -> Tree:
    """A reward model or critic from a language model: the same trunk without its head, plus a zero value head."""
    trunk = {name: leaf for name, leaf in params.items() if name != "head"}
    return {**trunk, "score": nnx.to_pure_dict(nnx.state(ValueHead(config), nnx.Param))}


def abstract_params(config: DecoderConfig, *, head: Head = "lm") -> Tree:
    """Shapes and types of the parameters, without making any."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(config, head))


@lru_cache
def _abstract_params(config: DecoderConfig, head: Head) -> Tree:
    """Traced once: it takes 30 to 50 ms, and a table of 180 stages asks for hundreds.

    The key is made inside, so that checks before a run's first stage neither compile nor put anything on a device.
    """
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.eval_shape(partial(with_score_head, config=config), params) if head == "value" else params


def abstract_split(model: Model, *, head: Head = "lm") -> Params:
    """Shapes and types of what trains and of what is frozen: all and nothing, or an adapter and the rest."""
    tree = abstract_params(model.decoder, head=head)
    if model.adapter is None:
        return trainable(tree)
    return adapter.split(tree, _abstract_adapter(model.decoder, model.adapter), head)


@lru_cache
def _abstract_adapter(config: DecoderConfig, adapted: Adapter) -> Tree:
    layers = abstract_params(config)["layers"]
    return jax.eval_shape(lambda: adapter.init(adapted, layers, jax.random.key(0)))


def num_parameters(config: DecoderConfig, *, head: Head = "lm") -> int:
    """How many numbers the parameters hold; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, head=head)))


def param_shardings(params: Tree, mesh: Mesh) -> Any:
    """NamedShardings of a parameter tree (arrays or shapes) by the one table of logical axes.

    A parameter that the decoder does not have, of a user's own model, is on every device whole.
    """
    flat: dict[Any, Any] = flatten_dict(params)
    axes = {path: PARAM_AXES.get(".".join(path), (None,) * leaf.ndim) for path, leaf in flat.items()}
    return shardings_for(unflatten_dict(axes), params, mesh)


Caches: TypeAlias = tuple[tuple[Array, Array], ...]
"""Keys and values [B G T K] of every layer."""


def for_decoding(model: Model, params: Tree) -> Tree:
    """The parameters in the arithmetic's type and whole along `fsdp`, layers one by one and fused, the head a matrix.

    Made once for a sampling phase: as training lays them out, every token would gather, cast and cut them anew.
    Norms keep their type: they are computed in float32. Adapters are folded into the kernels.
    """
    if model.adapter is None:
        params = {**params, "layers": quantised.restored(params["layers"], model.dtype)}
    else:
        params = adapter.folded(params, model.adapter, model.dtype)

    def gather(path: tuple[str, ...], leaf: Array) -> Array:
        name = ".".join(path)
        # the layout before it is fixed too: the partitioner would gather first and cast then, twice the bytes
        cast = leaf if name.endswith(FLOAT32) else constrain(leaf.astype(model.dtype), *PARAM_AXES[name])
        return constrain(cast, *PARAM_AXES[name], without="fsdp")

    flat: dict[Any, Any] = flatten_dict(params)
    whole: Tree = unflatten_dict({path: gather(path, leaf) for path, leaf in flat.items()})
    layers = [fuse(jax.tree.map(itemgetter(i), whole["layers"])) for i in range(model.decoder.num_layers)]
    return {**whole, "head": head_matrix(model, whole), "layers": layers}


def join(joined: PromptBatch) -> Tokens:
    """One row a prompt, prompt-shared: [prompt | response 1 | ... | response N], padding where lengths end.

    Returns Tokens [B, P + N S]; the first response token's predecessor is the prompt's last token.
    """
    B, P = joined.prompt.shape
    _, N, S = joined.response.shape
    prompt_mask = jnp.arange(P)[None] < joined.prompt_len[:, None]
    response_mask = jnp.arange(S)[None, None] < joined.response_len[..., None]
    prompt_position = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    response_position = jnp.broadcast_to(joined.prompt_len[:, None, None] + jnp.arange(S)[None, None], (B, N, S))
    branch = jnp.broadcast_to(jnp.arange(1, N + 1)[None, :, None], (B, N, S))

    def row(prompt_part, response_part):
        return jnp.concatenate([prompt_part, rearrange(response_part, "b n s -> b (n s)")], 1)

    segment = row(prompt_mask, response_mask).astype(jnp.int32)
    return Tokens(
        ids=row(joined.prompt, joined.response),
        position=row(prompt_position, response_position) * segment,
        segment=segment,
        branch=row(jnp.zeros((B, P), jnp.int32), branch),
        loss_mask=row(jnp.zeros((B, P), bool), response_mask & (joined.prompt_len > 0)[:, None, None]),
        scored_from=P,
        # without responses the stretch after the prompt is one, of no width
        num_responses=max(N, 1),
    )


def predecessor(tokens: Tokens) -> Int[Array, "B T"]:
    """Index in the row of the token before each token: the one place where the shift by one happens.

    t - 1 inside a branch; for a branch's first token the last token of its segment's prompt. A row's first token has no
    predecessor: it gets 0 and must never be scored.
    """
    index = jnp.broadcast_to(jnp.arange(tokens.ids.shape[1])[None], tokens.ids.shape)
    in_prompt = (tokens.branch == 0) & (tokens.segment > 0)
    prompt_end = jax.lax.cummax(jnp.where(in_prompt, index, 0), axis=1)
    before = jnp.maximum(index - 1, 0)
    same = (jnp.take_along_axis(tokens.branch, before, 1) == tokens.branch) & (
        jnp.take_along_axis(tokens.segment, before, 1) == tokens.segment
    )
    return jnp.where(same, before, prompt_end)


def _rotations(model: Model, position_BT: Int[Array, "B T"]) -> tuple[tuple[Array, Array], ...]:
    """cos and sin for each layer of the pattern."""
    sizes = model.decoder

    def make(spec: LayerSpec) -> tuple[Array, Array]:
        return rope_tables(spec, sizes.head_dim, position_BT)

    return shared(sizes.pattern, make, "rope_theta", "rope_scaling", "rope_fraction")


def visible_slots(
    model: Model,
    prompt_len_B: Int[Array, " B"],
    widths: tuple[int, int, int],
    stored_B: Int[Array, " B"],
    slot: int | Int[Array, ""],
) -> tuple[Bool[Array, "B T"], ...]:
    """`attention.visible_slots` for each layer of the pattern."""

    def make(spec: LayerSpec) -> Bool[Array, "B T"]:
        return attention.visible_slots(prompt_len_B, widths, stored_B, slot, spec.window)

    return shared(model.decoder.pattern, make, "window")


def hidden_states(model: Model, params: Tree, tokens: Tokens) -> Float[Array, "B T D"]:
    """Final hidden states after the last norm, of the model's dtype."""
    return _run_layers(model, params, tokens, keep_cache=False)[0]


def prefill(model: Model, params: Tree, tokens: Tokens) -> tuple[Array, Caches]:
    """Hidden states, and every layer's keys and values, each [B G T K]."""
    hidden, caches = _run_layers(model, params, tokens, keep_cache=True)
    key, value = (rearrange(x, "l b t g k -> l b g t k") for x in caches)
    return hidden, tuple((key[i], value[i]) for i in range(model.decoder.num_layers))


def _run_layers(model: Model, params: Tree, tokens: Tokens, *, keep_cache: bool) -> tuple[Array, Any]:
    trunk, pattern = modules.trunk(model, params), model.decoder.pattern
    x = constrain(trunk.embed(tokens.ids, jnp.dtype(model.dtype)), "batch", None, None)
    rotations = _rotations(model, tokens.position)
    make = partial(attention.for_layer, tokens, implementation=model.attention)
    attends = shared(pattern, make, "window", "scale", "soft_cap")

    def layer(place: int, x: Array, layer_params: Tree) -> tuple[Array, Any]:
        """The layer at one place of the pattern."""
        block = modules.block(model, pattern[place], layer_params)
        x, cache = block.full(x, *rotations[place], attends[place])
        return x, cache if keep_cache else None

    x, caches = scan_layers(layer, model.decoder, x, params["layers"], model.remat)
    return trunk.norm(x), caches


def decode_step(
    model: Model,
    weights: Tree,
    ids_B: Int[Array, " B"],
    position_B: Int[Array, " B"],
    stored: tuple[Caches, ...],
    recent: Caches,
    visible: tuple[Bool[Array, "B T"], ...],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "B D"], Caches]:
    """One new token a row: its hidden state, and `recent` with the token written at `slot`.

    The layers are not scanned: a scan would copy every layer's weights and caches out of a stack for every token.

    Args:
      weights: what `for_decoding` gives.
      stored: the caches in parts along the slots; trailing parts may be missing where no row sees them.
      visible: for each layer of the pattern, the slots of all parts of `stored`, then of `recent`, that each row sees,
        `slot` included.
    """
    trunk, pattern = modules.trunk(model, weights), model.decoder.pattern
    x = trunk.embed(ids_B[:, None], jnp.dtype(model.dtype))
    rotations = _rotations(model, position_B[:, None])
    written = []
    for i, (layer, new) in enumerate(zip(weights["layers"], recent, strict=True)):
        place, old = i % len(pattern), tuple(part[i] for part in stored)
        block = modules.block(model, pattern[place], layer, fused=True)
        x, new = block.cached(x, *rotations[place], old, new, visible[place], slot)
        written.append(new)
    return trunk.norm(x)[:, 0], tuple(written)


def head_matrix(model: Model, params: Tree) -> Float[Array, "D V"]:
    """The language-model head; the embedding's transpose where it is tied."""
    return params["embedding"].T if model.decoder.tie_embeddings else params["head"]


def whole_head(model: Model, params: Tree) -> Float[Array, "D V"]:
    """The head whole along D: divided there, the backward pass would gather a chunk's logits on every device."""
    return constrain(head_matrix(model, params), None, "vocab")


def logits_from_hidden(
    model: Model, hidden: Float[Array, "B T D"], head_DV: Array, *, temperature: float, allowed_V: Array | None
) -> Float[Array, "B T V"]:
    """float32 logits, capped where the model does, over temperature; ids that are not allowed get the lowest float.

    So their probability is 0.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.matmul(rows, head_DV.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = attention.soft_capped(logits.reshape(*hidden.shape[:-1], -1), model.decoder.final_soft_cap)
    if temperature != 1.0:
        logits = logits / temperature
    if allowed_V is None:
        return logits
    return jnp.where(allowed_V[None, None], logits, jnp.finfo(jnp.float32).min)


def logits(model: Model, params: Tree, tokens: Tokens) -> Float[Array, "B T V"]:
    """All next-token logits; for tests and small inputs, since training never holds [B T V]."""
    hidden = hidden_states(model, params, tokens)
    return logits_from_hidden(model, hidden, head_matrix(model, params), temperature=1.0, allowed_V=None)


def ids_logp(
    model: Model,
    hidden: Float[Array, "B T D"],
    ids: Int[Array, "B T"],
    head_DV: Array,
    *,
    with_entropy: bool = False,
    **options: Any,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p of the ids after the hidden states in their columns and the entropy there, in nats; 0 unless asked for.

    Options are those of `logits_from_hidden`.
    """
    logits = constrain(logits_from_hidden(model, hidden, head_DV, **options), "batch", None, "vocab")
    log_z = jax.nn.logsumexp(logits, -1)
    logp = jnp.take_along_axis(logits, ids[..., None], -1)[..., 0] - log_z
    if not with_entropy:
        return logp, jnp.zeros_like(logp)
    probability = jnp.exp(logits - log_z[..., None])
    return logp, log_z - (probability * jnp.where(probability > 0, logits, 0.0)).sum(-1)


def token_logp(
    model: Model,
    params: Tree,
    tokens: Tokens,
    *,
    temperature: float = 1.0,
    allowed_V: Bool[Array, " V"] | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """log p(ids[t] | what t sees) and the entropy there, in nats, for the columns from `tokens.scored_from` on.

    Columns whose loss mask is False hold 0. The entropy is 0 unless asked for. Logits exist for `model.logit_chunk`
    tokens at a time, in the backward pass too.
    """
    start = tokens.scored_from
    hidden = hidden_states(model, params, tokens)
    before_BS = predecessor(tokens)[:, start:]
    hidden_BSD = jnp.take_along_axis(hidden, before_BS[..., None], 1)
    ids_BS, mask_BS = tokens.ids[:, start:], tokens.loss_mask[:, start:]
    head_DV = whole_head(model, params)

    def chunk(hidden, ids):
        return ids_logp(
            model, hidden, ids, head_DV, temperature=temperature, allowed_V=allowed_V, with_entropy=with_entropy
        )

    B, S = ids_BS.shape
    width = max(1, min(S, model.logit_chunk // B))
    if width == S:
        logp, entropy = chunk(hidden_BSD, ids_BS)
    else:
        padding = -S % width
        pad = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
        chunks = [rearrange(pad(x), "b (c w) ... -> c b w ...", w=width) for x in (hidden_BSD, ids_BS)]
        logp, entropy = jax.lax.map(lambda xs: jax.checkpoint(chunk)(*xs), tuple(chunks))
        logp, entropy = (rearrange(x, "c b w -> b (c w)")[:, :S] for x in (logp, entropy))
    return jnp.where(mask_BS, logp, 0.0), jnp.where(mask_BS, entropy, 0.0)


def scores(model: Model, params: Tree, tokens: Tokens) -> Float[Array, "B T"]:
    """The value head at every token, float32: a reward model's score or a critic's value after that token."""
    head = modules.value_head(model, params)
    return head(hidden_states(model, params, tokens))


def values_before(score_BT: Float[Array, "B T"], tokens: Tokens) -> Float[Array, "B S"]:
    """value[:, t], the state's value *before* action t, from scores at predecessors; columns from `scored_from` on."""
    return jnp.take_along_axis(score_BT, predecessor(tokens)[:, tokens.scored_from :], 1)


def response_scores(score_BT: Float[Array, "B T"], joined: PromptBatch) -> Float[Array, "B N"]:
    """Each response's score: the value head at its last real token; 0 where there is none."""
    P = joined.prompt.shape[1]
    score_BNS = rearrange(score_BT[:, P:], "b (n s) -> b n s", n=joined.response.shape[1])
    last_BN = jnp.maximum(joined.response_len - 1, 0)
    picked_BN = jnp.take_along_axis(score_BNS, last_BN[..., None], -1)[..., 0]
    return jnp.where(joined.response_len > 0, picked_BN, 0.0)


def response_sums(x_BS: Float[Array, "B S"], num_responses: int) -> Float[Array, "B N"]:
    """Sums of a response-token array (0 at padding) over each of a row's responses."""
    return rearrange(x_BS, "b (n s) -> b n s", n=num_responses).sum(-1)


def response_logps(model: Model, params: Tree, joined: PromptBatch) -> Float[Array, "B N"]:
    """Each response's summed log-probability in nats, EOS included."""
    logp_BS, _ = token_logp(model, params, join(joined))
    return response_sums(logp_BS, joined.response.shape[1])


@lru_cache
def make_response_logps(model: Model, mesh: Mesh) -> Any:
    """A jitted (params, batch) -> summed log-probabilities [B N]."""

    def logps(params: Params, batch: PromptBatch) -> Float[Array, "B N"]:
        return response_logps(model, merge(params), batch)

    return jax.jit(logps, out_shardings=replicated(mesh))


@lru_cache
def make_score_pairs(model: Model, mesh: Mesh) -> Any:
    """The batched vmap scoring pass: jitted (params, batch) -> raw scores [B N] of every prompt's responses."""

    def score_row(tree: Tree, row: PromptBatch) -> Float[Array, " N"]:
        batch = jax.tree.map(lambda x: x[None], row)
        return response_scores(scores(model, tree, join(batch)), batch)[0]

    score_rows = make_pair_scorer(score_row, spmd_axis_name=BATCH_AXES)

    def score_pairs(params: Params, batch: PromptBatch) -> Float[Array, "B N"]:
        return score_rows(merge(params), batch)

    return jax.jit(score_pairs, out_shardings=replicated(mesh))
