"""mpo_jax.models.forward: the token layout, log-probs and scores, cached decoding, memory, and sharding."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mpo_jax.models import attention, forward
from mpo_jax.models.adapter import Adapter
from mpo_jax.models.forward import Model
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.types import PromptBatch, Tokens, frozen
from tests.models.tiny import DECODER, batch, close, mesh_of, random_params, trees_close

MODEL = Model(DECODER)
ALLOWED = np.arange(40) % 3 != 1

WIDTH = (7, 6)
"""Prompt and response columns of most cases, so that they share their compiled functions."""

all_logits = jax.jit(forward.logits, static_argnums=0)


@partial(jax.jit, static_argnums=0, static_argnames=("temperature", "with_entropy"))
def _outputs(model, params, tokens, **options):
    logp_BS, entropy_BS = forward.token_logp(model, params, tokens, **options)
    return {"logp": logp_BS, "entropy": entropy_BS, "score_BT": forward.scores(model, params, tokens)}


@partial(jax.jit, static_argnums=0, static_argnames=("temperature", "with_entropy"))
def _outputs_of_joined(model, params, joined, **options):
    tokens = forward.join(joined)
    out = _outputs(model, params, tokens, **options)
    out = out | {name: out[name].reshape(joined.response.shape) for name in ("logp", "entropy")}
    value_BS = forward.values_before(out["score_BT"], tokens).reshape(joined.response.shape)
    return out | {"score": forward.response_scores(out["score_BT"], joined), "value": value_BS}


def outputs(params, joined, model=MODEL, with_entropy=True, **options):
    """On the host: log-probs, entropies and values [B N S], scores [B N] and at every token [B T]."""
    function = _outputs_of_joined if isinstance(joined, PromptBatch) else _outputs
    return jax.device_get(function(model, params, joined, with_entropy=with_entropy, **options))


@pytest.fixture(scope="module")
def params():
    """One trunk with both heads."""
    return {**random_params(DECODER), "score": random_params(DECODER, 1, head="value")["score"]}


@pytest.fixture(scope="module")
def pairs() -> PromptBatch:
    """Uneven pairs, one of them with an empty side, and a filler row."""
    return batch([5, 1, 7, 0], [[4, 6], [6, 1], [2, 0], [0, 0]], width=WIDTH)


@pytest.fixture(scope="module")
def reference(params, pairs):
    return outputs(params, pairs)


def side(joined: PromptBatch, n: int) -> PromptBatch:
    """One response of each prompt, in a batch of its own."""
    return dataclasses.replace(
        joined, response=joined.response[:, n : n + 1], response_len=joined.response_len[:, n : n + 1]
    )


def rows(joined: PromptBatch, order) -> PromptBatch:
    return jax.tree.map(lambda x: x[order], joined)


# ---- layout --------------------------------------------------------------------------------------------------------


def hand_made() -> PromptBatch:
    """Prompt of 2 in 3 columns, responses of 2 and 1 in 2 columns each."""
    return PromptBatch(
        prompt=np.array([[11, 12, 99]], np.int32),
        prompt_len=np.array([2], np.int32),
        response=np.array([[[21, 22], [31, 99]]], np.int32),
        response_len=np.array([[2, 1]], np.int32),
        key=np.array([0], np.uint32),
    )


def test_join_by_hand():
    tokens = forward.join(hand_made())
    assert tokens.ids.tolist() == [[11, 12, 99, 21, 22, 31, 99]]
    assert tokens.segment.tolist() == [[1, 1, 0, 1, 1, 1, 0]]
    assert tokens.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert tokens.loss_mask.tolist() == [[False, False, False, True, True, True, False]]
    assert tokens.position.tolist() == [[0, 1, 0, 2, 3, 2, 0]], "every response continues the prompt's positions"
    assert tokens.scored_from == 3


def test_predecessor_by_hand():
    predecessor = forward.predecessor(forward.join(hand_made()))[0].tolist()
    assert predecessor[:2] == [0, 0]
    assert predecessor[3:6] == [1, 3, 1], "first tokens come after the prompt's last, across the padding"


def test_predecessor_in_packed_rows():
    """Two segments in one row, the second with two responses; padding between and after."""
    tokens = Tokens(
        ids=jnp.zeros((1, 12), jnp.int32),
        position=jnp.array([[0, 1, 2, 3, 0, 0, 1, 2, 2, 3, 4, 0]]),
        segment=jnp.array([[1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0]]),
        branch=jnp.array([[0, 0, 1, 1, 0, 0, 0, 1, 2, 2, 2, 0]]),
        loss_mask=jnp.zeros((1, 12), bool),
    )
    predecessor = forward.predecessor(tokens)[0].tolist()
    scored = {2: 1, 3: 2, 7: 6, 8: 6, 9: 8, 10: 9}
    assert {t: predecessor[t] for t in scored} == scored
    assert predecessor[1] == 0 and predecessor[6] == 5


def test_what_a_token_sees_by_hand():
    tokens = forward.join(hand_made())
    mask = attention.sees(tokens, tokens, None)
    wanted = [
        "x......",
        "xx.....",
        ".......",
        "xx.x...",
        "xx.xx..",
        "xx...x.",
        ".......",
    ]
    assert mask.shape == (1, 7, 7)
    assert ["".join(".x"[int(seen)] for seen in row) for row in mask[0]] == wanted


def test_index_zero_is_never_scored(params):
    """Even where a prompt is empty, nothing at index 0 counts: such a row is filler, whatever its responses hold."""
    joined = batch([0, 3, 0, 3], [[3, 6]] * 4, width=WIDTH)
    mask = np.asarray(forward.join(joined).loss_mask)
    assert not mask[[0, 2]].any() and mask[1].sum() == 9 and not mask[:, 0].any()
    logp = outputs(params, joined)["logp"]
    assert not logp[0].any() and (logp[1, 1] < 0).all()


def test_log_probs_are_those_of_the_logits(params, pairs, reference):
    """Against log_softmax in NumPy, one token at a time, of two rows of 9 tokens without any padding."""
    lengths = [(int(pairs.prompt_len[b]), int(pairs.response_len[b, 0])) for b in (0, 2)]
    ids = [
        np.concatenate([pairs.prompt[b, :p], pairs.response[b, 0, :s]])
        for b, (p, s) in zip((0, 2), lengths, strict=True)
    ]
    ones = np.ones((2, 9), np.int32)
    plain = Tokens(np.stack(ids), np.cumsum(ones, 1) - 1, ones, 0 * ones, ones > 0)
    logits = np.asarray(all_logits(MODEL, params, plain), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, b, (p, s) in zip(range(2), (0, 2), lengths, strict=True):
        wanted = [log_p[row, p + t - 1, pairs.response[b, 0, t]] for t in range(s)]
        close(reference["logp"][b, 0, :s], wanted, atol=1e-5)
        close(reference["entropy"][b, 0, :s], -(np.exp(log_p) * log_p).sum(-1)[row, p - 1 : p + s - 1], atol=1e-5)
        assert not reference["logp"][b, 0, s:].any() and not reference["entropy"][b, 0, s:].any()


def test_shared_prompt_equals_separate_rows(params, pairs, reference):
    for n in range(2):
        alone = outputs(params, side(pairs, n))
        for name in ("logp", "entropy", "score"):
            close(reference[name][:, n], alone[name][:, 0])
    assert (reference["logp"][0, 0, :4] < 0).all() and (reference["logp"][0, 1] < 0).all()


def test_packed_row_equals_its_parts(params, pairs, reference):
    """Two examples in one row as two segments, padding between: each gets what it gets alone."""
    prompts = [pairs.prompt[b, : pairs.prompt_len[b]] for b in (0, 1)]
    responses = [pairs.response[b, 0, : pairs.response_len[b, 0]] for b in (0, 1)]
    padding = np.array([7, 7])
    ids = np.concatenate([prompts[0], responses[0], padding, prompts[1], responses[1]])
    position = np.concatenate([np.arange(9), [0, 0], np.arange(7)])
    segment = np.repeat([1, 0, 2], [9, 2, 7])
    branch = np.repeat([0, 1, 0, 1], [5, 6, 1, 6]) * (segment > 0)
    packed = Tokens(*(x[None].astype(np.int32) for x in (ids, position, segment, branch)), branch[None] > 0)
    logp = outputs(params, packed)["logp"][0]
    close(logp[5:9], reference["logp"][0, 0, :4], atol=1e-5)
    close(logp[12:], reference["logp"][1, 0], atol=1e-5)
    assert not logp[9:12].any()


def test_padding_changes_nothing(params, pairs, reference):
    """Wider prompts and responses with other garbage in them."""
    wide = batch(pairs.prompt_len, pairs.response_len, width=(WIDTH[0] + 4, WIDTH[1] + 3))
    kept = np.arange(WIDTH[1])[None, None] < pairs.response_len[..., None]
    np.testing.assert_array_equal(wide.response[:, :, : WIDTH[1]][kept], pairs.response[kept])
    assert (wide.response[:, :, : WIDTH[1]][~kept] != pairs.response[~kept]).any()
    out = outputs(params, wide)
    close(out["logp"][:, :, : WIDTH[1]], reference["logp"], rtol=2e-6)
    assert not out["logp"][:, :, WIDTH[1] :].any()
    close(out["score"], reference["score"], rtol=2e-6)


def test_batch_order_changes_nothing(params, pairs, reference):
    order = np.array([2, 0, 3, 1])
    out = outputs(params, rows(pairs, order))
    for name in ("logp", "entropy", "score"):
        np.testing.assert_array_equal(out[name], reference[name][order])


def test_filler_and_padding_give_zero_and_finite_gradients(params):
    joined = batch([0, 3, 0, 0], [[0, 0], [0, 2], [0, 0], [0, 0]], width=WIDTH)
    out = outputs(params, joined)
    scored = np.zeros((4, 2, 6), bool)
    scored[1, 1, :2] = True
    assert (out["logp"][scored] < 0).all() and not out["logp"][~scored].any()
    assert (out["score"] != 0).tolist() == [[False, False], [False, True], [False, False], [False, False]]

    @jax.jit
    @jax.grad
    def gradients(params, joined):
        tokens = forward.join(joined)
        logp, entropy = forward.token_logp(MODEL, params, tokens, with_entropy=True)
        score = forward.response_scores(forward.scores(MODEL, params, tokens), joined)
        return (logp + entropy).sum() + score.sum()

    some = jax.tree.leaves(jax.device_get(gradients(params, joined)))
    assert all(np.isfinite(x).all() for x in some) and all(x.any() for x in some)
    filler = jax.device_get(gradients(params, rows(joined, np.array([0, 2, 3, 0]))))
    assert not any(x.any() for x in jax.tree.leaves(filler)), "a batch of filler alone teaches nothing"


def test_a_branch_cannot_see_another(params):
    joined = batch([4, 3, 7, 1], [[5, 5], [4, 5], [6, 6], [1, 2]], width=WIDTH)
    response = joined.response.copy()
    response[:, 0] = (response[:, 0] + 1) % 40
    before, after = (outputs(params, x) for x in (joined, dataclasses.replace(joined, response=response)))
    for name in ("logp", "entropy", "score"):
        np.testing.assert_array_equal(after[name][:, 1], before[name][:, 1])
        assert (after[name][:, 0] != before[name][:, 0]).any()


def test_the_future_has_no_influence(params):
    joined = batch([4, 7, 1, 2], [[6, 6]] * 4, width=WIDTH)
    before = outputs(params, joined)["logp"]
    for t in range(6):
        response = joined.response.copy()
        response[:, :, t] = (response[:, :, t] + 1) % 40
        after = outputs(params, dataclasses.replace(joined, response=response))["logp"]
        np.testing.assert_array_equal(after[:, :, :t], before[:, :, :t])
        assert (after[:, :, t:] != before[:, :, t:]).all(), "and the present has"


def test_values_are_those_before_the_action(pairs, reference):
    """The value of a response's first token is read at the prompt's last token, then one token back."""
    for b in range(3):
        for n in range(2):
            for t in range(pairs.response_len[b, n]):
                column = WIDTH[0] + n * WIDTH[1] + t - 1 if t else pairs.prompt_len[b] - 1
                assert reference["value"][b, n, t] == reference["score_BT"][b, column]


def test_response_sums_and_scores_by_hand():
    joined = batch([2, 2], [[2, 3], [0, 1]], width=(2, 3))
    score = jnp.arange(16.0).reshape(2, 8)
    assert forward.response_scores(score, joined).tolist() == [[3.0, 7.0], [0.0, 13.0]]
    assert forward.response_sums(score[:, 2:], 2).tolist() == [[9.0, 18.0], [33.0, 42.0]]


def test_score_pairs_equals_the_plain_pass(params, pairs, reference):
    """The vmapped pass over devices gives what one batch gives."""
    scalar_params = {name: params[name] for name in ("embedding", "norm", "layers", "score")}
    for mesh in (mesh_of(1, 1, 1), mesh_of(2, 2, 2)):
        placed = jax.device_put(scalar_params, forward.param_shardings(scalar_params, mesh))
        with jax.set_mesh(mesh):
            score = forward.make_score_pairs(MODEL, mesh)(frozen(placed), place_batch(pairs, mesh))
        close(score, reference["score"], atol=1e-5)
        assert score.sharding.is_fully_replicated


# ---- log-probs in chunks -------------------------------------------------------------------------------------------


def loss_and_grads(model, params, tokens, **options):
    """(log-probs, entropies), gradients of a weighted sum of both, and the compiled function's scratch memory."""

    def total(params):
        logp, entropy = forward.token_logp(model, params, tokens, with_entropy=True, **options)
        weight = jnp.cos(jnp.arange(logp.size)).reshape(logp.shape)
        return (weight * logp + 0.3 * entropy).sum(), (logp, entropy)

    compiled = jax.jit(jax.grad(total, has_aux=True)).lower(params).compile()
    grads, out = jax.device_get(compiled(params))
    return out, grads, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.optimised
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_change_nothing_and_logits_of_the_batch_never_exist(tied):
    """100 columns in chunks of 3 tokens a row. Scratch memory stays far below the size of the [B T V] logits."""
    vocab, tokens = 8000, forward.join(batch([4] * 8, [[100]] * 8))
    small = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    config = dataclasses.replace(DECODER, vocab_size=vocab, tie_embeddings=tied, **small)
    params, logits_bytes = random_params(config), 8 * 100 * vocab * 4
    whole, whole_grads, whole_scratch = loss_and_grads(Model(config, logit_chunk=8 * 100), params, tokens)
    parts, grads, scratch = loss_and_grads(Model(config, logit_chunk=8 * 3), params, tokens)
    for actual, expected in zip(parts, whole, strict=True):
        close(actual, expected)
    trees_close(grads, whole_grads)
    assert scratch < logits_bytes / 4
    assert whole_scratch > logits_bytes, "the measure sees logits where they do exist"


@pytest.mark.thorough
def test_single_tokens_as_chunks(pairs):
    """A chunk smaller than the batch, with temperature, banned ids and a tied head."""
    config, allowed = dataclasses.replace(DECODER, tie_embeddings=True), jnp.asarray(ALLOWED)
    tokens = forward.join(pairs)
    tokens = dataclasses.replace(tokens, ids=np.where(ALLOWED[tokens.ids], tokens.ids, 0))
    params, options = random_params(config), {"temperature": 0.7, "allowed_V": allowed}
    whole, whole_grads, _ = loss_and_grads(Model(config), params, tokens, **options)
    parts, grads, _ = loss_and_grads(Model(config, logit_chunk=1), params, tokens, **options)
    for actual, expected in zip(parts, whole, strict=True):
        close(actual, expected)
    trees_close(grads, whole_grads)


@pytest.mark.optimised
@pytest.mark.thorough
def test_remat_keeps_less_and_changes_no_gradient():
    """Eight layers of 40 tokens, whose activations are most of the memory."""
    config = dataclasses.replace(DECODER, num_layers=8)
    params = forward.init_params(config, jax.random.key(0))
    tokens = forward.join(batch([4] * 4, [[36]] * 4))
    out = {remat: loss_and_grads(Model(config, remat=remat), params, tokens) for remat in ("none", "dots", "full")}
    for remat in ("dots", "full"):
        trees_close(out[remat][:2], out["none"][:2])
    assert out["full"][2] < out["dots"][2] < out["none"][2]


# ---- the sampling distribution -------------------------------------------------------------------------------------


def every_id(joined: PromptBatch) -> PromptBatch:
    """A response of one token for each id of the vocabulary, all after one prompt."""
    ids = np.arange(40, dtype=np.int32)
    return dataclasses.replace(joined, response=ids[None, :, None], response_len=np.ones((1, 40), np.int32))


@pytest.mark.thorough
def test_probabilities_of_all_ids_sum_to_one(params):
    """Under temperature: banned ids have probability exactly 0, and the rest share theirs in proportion."""
    prompt = batch([5], [[1]])
    logits = np.asarray(all_logits(MODEL, params, forward.join(prompt))[0, 4], np.float64) / 0.5
    log_p = logits - np.log(np.exp(logits).sum())
    free = outputs(params, every_id(prompt), temperature=0.5)
    close(free["logp"][0, :, 0], log_p, atol=1e-5)
    out = outputs(params, every_id(prompt), temperature=0.5, allowed_V=jnp.asarray(ALLOWED))
    allowed = out["logp"][0, :, 0]
    close(allowed[ALLOWED], (log_p - np.log(np.exp(log_p[ALLOWED]).sum()))[ALLOWED], atol=1e-5)
    probability = np.exp(allowed.astype(np.float64))
    assert (probability[~ALLOWED] == 0).all()
    assert probability.sum() == pytest.approx(1, abs=1e-6)
    kept = allowed[ALLOWED].astype(np.float64)
    close(out["entropy"][0, :, 0], np.full(40, -(np.exp(kept) * kept).sum()), atol=1e-5)


def test_entropy_is_zero_unless_asked_for(params, pairs, reference):
    out = outputs(params, pairs, with_entropy=False)
    assert not out["entropy"].any() and reference["entropy"].any()
    close(out["logp"], reference["logp"])


def test_bfloat16_returns_float32(params, pairs, reference):
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    out = outputs(params, pairs, model)
    assert {x.dtype for x in out.values()} == {np.dtype(np.float32)}
    hidden = jax.eval_shape(lambda p: forward.hidden_states(model, p, forward.join(pairs)), params)
    assert hidden.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(out["logp"] - reference["logp"]).max() < 0.5


# ---- cached decoding -----------------------------------------------------------------------------------------------


def test_cached_decoding_equals_the_full_forward(params):
    """Prompts of unlike lengths, teacher-forced: the logits that predict every response token, and the one after."""
    joined = batch([5, 1, 7], [[6]] * 3)
    width, S = 7, 6
    full = np.asarray(all_logits(MODEL, params, forward.join(joined)))
    empty = dataclasses.replace(joined, response=joined.response[:, :, :0], response_len=0 * joined.response_len)
    hidden, caches = jax.jit(forward.prefill, static_argnums=0)(MODEL, params, forward.join(empty))
    assert {x.shape for x in jax.tree.leaves(caches)} == {(3, 4, width, 6)}
    # two tokens are stored at their places, two are recent, and what lies beyond either is nonsense
    stored, recent = (jax.tree.map(lambda x, n=n: np.full((*x.shape[:2], n, 6), 9.0, x.dtype), caches) for n in (3, 4))
    stored = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 2), caches, stored)
    head = forward.head_matrix(MODEL, params)

    @jax.jit
    def logits(hidden):
        return forward.logits_from_hidden(MODEL, hidden, head, temperature=1.0, allowed_V=None)

    prompt_logits, rows3 = np.asarray(logits(hidden)), np.arange(3)
    close(prompt_logits[rows3, joined.prompt_len - 1], full[rows3, joined.prompt_len - 1], atol=1e-5)
    step = jax.jit(forward.decode_step, static_argnums=0)
    weights, merged = forward.for_decoding(MODEL, params), 0
    for t in range(S):
        if t == 2:
            stored = jax.tree.map(lambda x, y: x.at[:, :, width : width + 2].set(y[:, :, :2]), stored, recent)
            merged = 2
        visible = forward.visible_slots(
            MODEL, jnp.asarray(joined.prompt_len), (width, 3, 4), jnp.full(3, merged), t - merged
        )
        position, slot = joined.prompt_len + t, jnp.asarray(t - merged)
        hidden, recent = step(MODEL, weights, joined.response[:, 0, t], position, (stored,), recent, visible, slot)
        close(logits(hidden[:, None])[:, 0], full[:, width + t], atol=1e-5)


# ---- devices -------------------------------------------------------------------------------------------------------

MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]


def everything(params, joined):
    """Hidden states, log-probs, scores and the gradients through both heads on one trunk."""
    model, tokens = Model(DECODER, logit_chunk=8 * 5), forward.join(joined)

    def total(params):
        logp, entropy = forward.token_logp(model, params, tokens, with_entropy=True)
        score = forward.response_scores(forward.scores(model, params, tokens), joined)
        hidden = forward.hidden_states(model, params, tokens) * tokens.segment[..., None]
        weight = jnp.cos(jnp.arange(logp.size)).reshape(logp.shape)
        return (weight * logp).sum() + 0.1 * entropy.sum() + score.sum(), (logp, entropy, score, hidden)

    return jax.grad(total, has_aux=True)(params)


@pytest.fixture(scope="module")
def on_one_device(params):
    joined = batch([5, 1, 7, 3, 2, 6, 0, 4], [[4, 6], [6, 1], [2, 5], [1, 1], [3, 3], [6, 6], [0, 0], [2, 4]])
    return joined, jax.jit(everything)(params, joined)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", MESHES)
def test_devices_change_nothing(params, on_one_device, shape):
    joined, (wanted_grads, wanted) = on_one_device
    mesh = mesh_of(*shape)
    shardings = forward.param_shardings(params, mesh)
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        grads, out = jax.jit(everything, out_shardings=(shardings, None))(placed, place_batch(joined, mesh))
    trees_close(out, wanted, rtol=0, atol=1e-5)
    trees_close(grads, wanted_grads, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "part"),
    [((8, 1, 1), (2, 32, 8, 6)), ((1, 8, 1), (2, 4, 8, 6)), ((1, 2, 4), (2, 16, 2, 6)), ((2, 2, 2), (2, 16, 4, 6))],
)
def test_parameters_are_divided(params, shape, part):
    """A device's part of the queries' kernel, and all of a model's parts together once."""
    mesh = mesh_of(*shape)
    placed = jax.device_put(params, forward.param_shardings(params, mesh))
    assert placed["layers"]["attention"]["q"].addressable_shards[0].data.shape == part
    _, fsdp, tensor = shape
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(placed))
    flat = jax.tree_util.tree_leaves_with_path(params)
    divided = sum(x.size for path, x in flat if path[-1].key != "scale" and path[0].key != "score")
    assert held == divided // (fsdp * tensor) + sum(x.size for _, x in flat) - divided


@pytest.mark.parametrize("adapter", [None, Adapter(2, 4.0, ("query",))])
def test_shapes_are_known_before_anything_is_on_a_device(adapter):
    """Checks before the first stage ask for them; a key made outside the trace was two programs, compiled there."""
    config = dataclasses.replace(DECODER, intermediate_size=52)  # no test has asked for these shapes before
    with jax.transfer_guard("disallow_explicit"):
        params = forward.abstract_split(Model(config, adapter=adapter), head="value")
        assert forward.num_parameters(config) > 0
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def test_an_axis_that_does_not_divide_is_whole():
    config = dataclasses.replace(DECODER, num_kv_heads=2)
    shardings = forward.param_shardings(forward.abstract_params(config), mesh_of(1, 2, 4))
    attention = shardings["layers"]["attention"]
    assert attention["k"].spec == P(None, "fsdp", None, None)
    assert attention["q"].spec == P(None, "fsdp", "tensor", None)
