"""mpo_jax.model.functional: the token layout, log-probs and scores, cached decoding, memory, and sharding."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mpo_jax.model import functional
from mpo_jax.model.functional import Model
from mpo_jax.sharding import place_batch
from mpo_jax.types import Joined, Tokens
from tests.model.tiny import DECODER, batch, close, mesh_of, random_params, trees_close

MODEL = Model(DECODER)
ALLOWED = np.arange(40) % 3 != 1

token_logp = jax.jit(functional.token_logp, static_argnums=0, static_argnames=("temperature", "with_entropy"))
score_tokens = jax.jit(functional.scores, static_argnums=0)
all_logits = jax.jit(functional.logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return random_params(DECODER)


@pytest.fixture(scope="module")
def scalar_params():
    return random_params(DECODER, 1, scalar=True)


@pytest.fixture(scope="module")
def pairs() -> Joined:
    """Uneven pairs, one of them with an empty side, and a filler row."""
    return batch([5, 1, 7, 0], [[4, 6], [6, 1], [2, 0], [0, 0]])


def logp_of(model, params, joined, **options):
    """[B N S] log-probs of the responses, and the entropies."""
    B, N, S = joined.response.shape
    return tuple(x.reshape(B, N, S) for x in token_logp(model, params, functional.join(joined), **options))


def scores_of(model, params, joined):
    return functional.response_scores(score_tokens(model, params, functional.join(joined)), joined)


def side(joined: Joined, n: int) -> Joined:
    """One response of each prompt, in a batch of its own."""
    return dataclasses.replace(
        joined, response=joined.response[:, n : n + 1], response_len=joined.response_len[:, n : n + 1]
    )


def rows(joined: Joined, order) -> Joined:
    return jax.tree.map(lambda x: x[order], joined)


# ---- layout --------------------------------------------------------------------------------------------------------


def hand_made() -> Joined:
    """Prompt of 2 in 3 columns, responses of 2 and 1 in 2 columns each."""
    return Joined(
        prompt=np.array([[11, 12, 99]], np.int32),
        prompt_len=np.array([2], np.int32),
        response=np.array([[[21, 22], [31, 99]]], np.int32),
        response_len=np.array([[2, 1]], np.int32),
        key=np.array([0], np.uint32),
    )


def test_join_by_hand():
    tokens = functional.join(hand_made())
    assert tokens.ids.tolist() == [[11, 12, 99, 21, 22, 31, 99]]
    assert tokens.segment.tolist() == [[1, 1, 0, 1, 1, 1, 0]]
    assert tokens.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert tokens.loss_mask.tolist() == [[False, False, False, True, True, True, False]]
    assert tokens.position.tolist() == [[0, 1, 0, 2, 3, 2, 0]], "every response continues the prompt's positions"
    assert tokens.scored_from == 3


def test_predecessor_by_hand():
    predecessor = functional.predecessor(functional.join(hand_made()))[0].tolist()
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
    predecessor = functional.predecessor(tokens)[0].tolist()
    scored = {2: 1, 3: 2, 7: 6, 8: 6, 9: 8, 10: 9}
    assert {t: predecessor[t] for t in scored} == scored
    assert predecessor[1] == 0 and predecessor[6] == 5


def test_attention_mask_by_hand():
    mask = functional.attention_mask(functional.join(hand_made()))
    wanted = [
        "x......",
        "xx.....",
        ".......",
        "xx.x...",
        "xx.xx..",
        "xx...x.",
        ".......",
    ]
    assert mask.shape == (1, 1, 7, 7)
    assert ["".join(".x"[int(seen)] for seen in row) for row in mask[0, 0]] == wanted


def test_index_zero_is_never_scored(params):
    """Even where a prompt is empty, nothing at index 0 counts: such a row is filler."""
    joined = batch([0, 3], [[3], [2]])
    tokens = functional.join(joined)
    assert tokens.loss_mask.tolist() == [[False] * 6, [False, False, False, True, True, False]]
    logp, _ = logp_of(MODEL, params, joined)
    assert not logp[0].any() and (logp[1, 0, :2] < 0).all()


def test_log_probs_are_those_of_the_logits(params):
    """Against log_softmax in NumPy, one token at a time, of rows without any padding."""
    joined = batch([5, 2], [[4], [6]])
    logp, entropy = logp_of(MODEL, params, joined, with_entropy=True)
    for b in range(2):
        row = rows(joined, [b])
        length, S = int(row.prompt_len[0]), int(row.response_len[0, 0])
        alone = dataclasses.replace(row, prompt=row.prompt[:, :length], response=row.response[:, :, :S])
        logits = np.asarray(all_logits(MODEL, params, functional.join(alone))[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = [log_p[length + t - 1, alone.response[0, 0, t]] for t in range(S)]
        close(logp[b, 0, :S], wanted, atol=1e-5)
        close(entropy[b, 0, :S], -(np.exp(log_p) * log_p).sum(-1)[length - 1 : length + S - 1], atol=1e-5)
        assert not logp[b, 0, S:].any() and not entropy[b, 0, S:].any()


def test_shared_prompt_equals_separate_rows(params, scalar_params, pairs):
    logp, entropy = logp_of(MODEL, params, pairs, with_entropy=True)
    score = scores_of(MODEL, scalar_params, pairs)
    for n in range(2):
        one = side(pairs, n)
        alone = logp_of(MODEL, params, one, with_entropy=True)
        close(logp[:, n], alone[0][:, 0])
        close(entropy[:, n], alone[1][:, 0])
        close(score[:, n], scores_of(MODEL, scalar_params, one)[:, 0])
    assert (logp[0, 0, :4] < 0).all() and (logp[0, 1] < 0).all()


def test_packed_row_equals_its_parts(params):
    """Two examples in one row as two segments, padding between: each gets what it gets alone."""
    first, second = batch([4], [[3]], seed=1), batch([2], [[5]], seed=2)
    parts = [functional.join(first), functional.join(second)]

    def pack(name, padding=0):
        a, b = (getattr(part, name) for part in parts)
        return jnp.concatenate([a, jnp.full((1, 2), padding, a.dtype), b], 1)

    segment = jnp.concatenate([parts[0].segment, jnp.zeros((1, 2), jnp.int32), 2 * parts[1].segment], 1)
    packed = Tokens(pack("ids", 7), pack("position"), segment, pack("branch"), pack("loss_mask"))
    logp, _ = token_logp(MODEL, params, packed)
    close(logp[:, 4:7], token_logp(MODEL, params, parts[0])[0], atol=1e-5)
    close(logp[:, 11:], token_logp(MODEL, params, parts[1])[0], atol=1e-5)


def test_padding_changes_nothing(params, scalar_params, pairs):
    """Wider prompts and responses with other garbage in them."""
    width, S = pairs.prompt.shape[1], pairs.response.shape[2]
    wide = batch(pairs.prompt_len, pairs.response_len, width=(width + 4, S + 3))
    kept = np.arange(S)[None, None] < pairs.response_len[..., None]
    np.testing.assert_array_equal(wide.response[:, :, :S][kept], pairs.response[kept])
    narrow_logp, wide_logp = logp_of(MODEL, params, pairs)[0], logp_of(MODEL, params, wide)[0]
    close(wide_logp[:, :, :S], narrow_logp, rtol=2e-6)
    assert not wide_logp[:, :, S:].any()
    close(scores_of(MODEL, scalar_params, wide), scores_of(MODEL, scalar_params, pairs), rtol=2e-6)


def test_batch_order_changes_nothing(params, scalar_params, pairs):
    order = np.array([2, 0, 3, 1])
    logp, score = logp_of(MODEL, params, pairs)[0], scores_of(MODEL, scalar_params, pairs)
    shuffled = rows(pairs, order)
    np.testing.assert_array_equal(logp_of(MODEL, params, shuffled)[0], logp[order])
    np.testing.assert_array_equal(scores_of(MODEL, scalar_params, shuffled), score[order])


def test_filler_and_padding_give_zero_and_finite_gradients(params, scalar_params):
    joined = batch([0, 3, 0], [[0, 0], [0, 2], [0, 0]], width=(4, 3))
    logp, _ = logp_of(MODEL, params, joined)
    assert not logp[0].any() and not logp[2].any() and not logp[1, 0].any() and (logp[1, 1, :2] < 0).all()
    score = scores_of(MODEL, scalar_params, joined)
    assert score.tolist() == [[0, 0], [0, score[1, 1]], [0, 0]] and score[1, 1] != 0

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(params, scalar_params, joined):
        tokens = functional.join(joined)
        logp, entropy = functional.token_logp(MODEL, params, tokens, with_entropy=True)
        score = functional.response_scores(functional.scores(MODEL, scalar_params, tokens), joined)
        return (logp + entropy).sum() + score.sum()

    some = jax.tree.leaves(gradients(params, scalar_params, joined))
    assert all(jnp.isfinite(x).all() for x in some) and any(x.any() for x in some)
    filler = gradients(params, scalar_params, rows(joined, np.array([0, 2, 0])))
    assert not any(x.any() for x in jax.tree.leaves(filler)), "a batch of filler alone teaches nothing"


def test_a_branch_cannot_see_another(params, scalar_params):
    joined = batch([4, 3], [[5, 5], [4, 5]])
    response = joined.response.copy()
    response[:, 0] = (response[:, 0] + 1) % 40
    other = dataclasses.replace(joined, response=response)
    for function, p in ((lambda *a: logp_of(*a)[0], params), (scores_of, scalar_params)):
        before, after = function(MODEL, p, joined), function(MODEL, p, other)
        np.testing.assert_array_equal(after[:, 1], before[:, 1])
        assert (after[:, 0] != before[:, 0]).any()


def test_the_future_has_no_influence(params):
    joined = batch([4], [[6, 6]])
    before, _ = logp_of(MODEL, params, joined)
    for t in range(6):
        response = joined.response.copy()
        response[:, :, t] = (response[:, :, t] + 1) % 40
        after, _ = logp_of(MODEL, params, dataclasses.replace(joined, response=response))
        np.testing.assert_array_equal(after[:, :, :t], before[:, :, :t])
        assert (after[:, :, t:] != before[:, :, t:]).all(), "and the present has"


def test_values_are_those_before_the_action(scalar_params, pairs):
    """The value of a response's first token is read at the prompt's last token, then one token back."""
    tokens = functional.join(pairs)
    score_BT = score_tokens(MODEL, scalar_params, tokens)
    value = functional.values_before(score_BT, tokens).reshape(pairs.response.shape)
    width, S = pairs.prompt.shape[1], pairs.response.shape[2]
    for b in range(3):
        for n in range(2):
            for t in range(pairs.response_len[b, n]):
                column = width + n * S + t - 1 if t else pairs.prompt_len[b] - 1
                assert value[b, n, t] == score_BT[b, column]


def test_response_sums_and_scores_by_hand():
    joined = batch([2, 2], [[2, 3], [0, 1]], width=(2, 3))
    score = jnp.arange(16.0).reshape(2, 8)
    assert functional.response_scores(score, joined).tolist() == [[3.0, 7.0], [0.0, 13.0]]
    assert functional.response_sums(score[:, 2:], 2).tolist() == [[9.0, 18.0], [33.0, 42.0]]


def test_score_pairs_equals_the_plain_pass(scalar_params, pairs):
    """The vmapped pass over devices gives what one batch gives."""
    wanted = scores_of(MODEL, scalar_params, pairs)
    for mesh in (mesh_of(1, 1, 1), mesh_of(4, 1, 1), mesh_of(2, 2, 2)):
        placed = jax.device_put(scalar_params, functional.param_shardings(scalar_params, mesh))
        with jax.set_mesh(mesh):
            score = functional.make_score_pairs(MODEL, mesh)(placed, place_batch(pairs, mesh))
        close(score, wanted, atol=1e-5)
        assert score.sharding.is_fully_replicated


# ---- log-probs in chunks -------------------------------------------------------------------------------------------


def loss_and_grads(model, params, tokens, **options):
    def total(params):
        logp, entropy = functional.token_logp(model, params, tokens, with_entropy=True, **options)
        weight = jnp.cos(jnp.arange(logp.size)).reshape(logp.shape)
        return (weight * logp + 0.3 * entropy).sum(), (logp, entropy)

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return out, grads


def chunk_case(pairs, tied):
    """Parameters, tokens and options; the tied case has temperature and banned ids."""
    config = dataclasses.replace(DECODER, tie_embeddings=tied)
    tokens = functional.join(pairs)
    if not tied:
        return config, random_params(config), tokens, {}
    allowed = jnp.asarray(ALLOWED)
    tokens = dataclasses.replace(tokens, ids=jnp.where(allowed[tokens.ids], tokens.ids, 0))
    return config, random_params(config), tokens, {"temperature": 0.7, "allowed_V": allowed}


@pytest.mark.parametrize(("tied", "chunks"), [(False, [4 * 5, 4 * 11]), (True, [1, 4 * 6])])
def test_chunks_change_nothing(pairs, tied, chunks):
    """12 columns in chunks of 5, 11, 1 and 6 tokens a row."""
    config, params, tokens, options = chunk_case(pairs, tied)
    assert tokens.ids.shape[1] - tokens.scored_from == 12
    whole, whole_grads = loss_and_grads(Model(config), params, tokens, **options)
    for chunk in chunks:
        parts, grads = loss_and_grads(Model(config, logit_chunk=chunk), params, tokens, **options)
        for actual, expected in zip(parts, whole, strict=True):
            close(actual, expected)
        trees_close(grads, whole_grads)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_the_batch_never_exist(tied):
    """The compiled gradient's scratch memory stays far below the [B T V] logits', whose size it would need at least."""
    vocab, tokens = 8000, functional.join(batch([4] * 8, [[64]] * 8))
    small = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    config = dataclasses.replace(DECODER, vocab_size=vocab, tie_embeddings=tied, **small)

    def scratch(chunk):
        model = Model(config, logit_chunk=chunk)
        total = lambda params: functional.token_logp(model, params, tokens)[0].sum()  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(total)).lower(functional.abstract_params(config)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 8 * 64 * vocab * 4
    assert scratch(32) < logits / 4
    assert scratch(8 * 64) > logits, "the measure sees logits where they do exist"


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(params, pairs, remat):
    tokens = functional.join(pairs)
    _, wanted = loss_and_grads(MODEL, params, tokens)
    _, grads = loss_and_grads(dataclasses.replace(MODEL, remat=remat), params, tokens)
    trees_close(grads, wanted)


def test_remat_keeps_less():
    """Layers whose activations are most of the memory."""
    config = dataclasses.replace(DECODER, num_layers=8)
    tokens = functional.join(batch([4] * 4, [[60]] * 4))

    def scratch(remat):
        model = Model(config, remat=remat)
        total = lambda params: functional.token_logp(model, params, tokens)[0].sum()  # noqa: E731
        compiled = jax.jit(jax.grad(total)).lower(functional.abstract_params(config)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch("full") < scratch("dots") < scratch("none")


# ---- the sampling distribution -------------------------------------------------------------------------------------


def every_id(joined: Joined) -> Joined:
    """A response of one token for each id of the vocabulary, all after one prompt."""
    ids = np.arange(40, dtype=np.int32)
    return dataclasses.replace(joined, response=ids[None, :, None], response_len=np.ones((1, 40), np.int32))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_probabilities_of_all_ids_sum_to_one(params, temperature):
    """Banned ids have probability exactly 0, and the rest share theirs in proportion."""
    joined = every_id(batch([5], [[1]]))
    logits = all_logits(MODEL, params, functional.join(batch([5], [[1]])))[0, 4]
    free = logp_of(MODEL, params, joined, temperature=temperature)[0][0, :, 0]
    close(free, jax.nn.log_softmax(logits / temperature), atol=1e-5)
    allowed = logp_of(MODEL, params, joined, temperature=temperature, allowed_V=jnp.asarray(ALLOWED))[0][0, :, 0]
    probability = np.exp(np.asarray(allowed, np.float64))
    assert (probability[~ALLOWED] == 0).all() and (probability[ALLOWED] > 0).all()
    assert probability.sum() == pytest.approx(1, abs=1e-6)
    shift = np.asarray(allowed - free)[ALLOWED]
    close(shift, np.full_like(shift, shift.mean()), atol=1e-5)


def test_entropy_over_allowed_ids(params):
    joined = every_id(batch([5], [[1]]))
    options = {"allowed_V": jnp.asarray(ALLOWED), "temperature": 0.5}
    logp, entropy = logp_of(MODEL, params, joined, with_entropy=True, **options)
    logp = np.asarray(logp[0, ALLOWED, 0], np.float64)
    close(entropy[0, :, 0], np.full(40, -(np.exp(logp) * logp).sum()), atol=1e-5)
    without, zeros = logp_of(MODEL, params, joined, **options)
    assert not zeros.any() and (without[0, ALLOWED, 0] == logp.astype(np.float32)).all()


def test_bfloat16_returns_float32(params, scalar_params, pairs):
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    tokens = functional.join(pairs)
    half, _ = token_logp(model, params, tokens)
    full, _ = token_logp(MODEL, params, tokens)
    assert half.dtype == jnp.float32 and score_tokens(model, scalar_params, tokens).dtype == jnp.float32
    hidden = jax.eval_shape(lambda p: functional.hidden_states(model, p, tokens), params)
    assert hidden.dtype == jnp.bfloat16
    assert 1e-4 < float(jnp.abs(half - full).max()) < 0.5


# ---- cached decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_cached_decoding_equals_the_full_forward(tied):
    """Prompts of unlike lengths, teacher-forced: the logits that predict every response token, and the one after."""
    config = dataclasses.replace(DECODER, tie_embeddings=tied)
    model, params = Model(config), random_params(config)
    joined = batch([5, 1, 7], [[6]] * 3)
    width, S = 7, 6
    full = all_logits(model, params, functional.join(joined))
    empty = dataclasses.replace(joined, response=joined.response[:, :, :0], response_len=0 * joined.response_len)
    hidden, caches = jax.jit(functional.prefill, static_argnums=0)(model, params, functional.join(empty))
    assert caches[0].shape == (2, 3, 4, width, 6)
    caches = tuple(jnp.pad(x, ((0, 0),) * 3 + ((0, S), (0, 0)), constant_values=9.0) for x in caches)
    head = functional.head_matrix(model, params)

    def logits(hidden):
        return functional.logits_from_hidden(model, hidden, head, temperature=1.0, allowed_V=None)

    prompt_logits, rows3 = logits(hidden), np.arange(3)
    close(prompt_logits[rows3, joined.prompt_len - 1], full[rows3, joined.prompt_len - 1], atol=1e-5)
    step = jax.jit(functional.decode_step, static_argnums=0)
    slots = np.arange(width + S)[None]
    for t in range(S):
        visible = (slots < joined.prompt_len[:, None]) | ((slots >= width) & (slots <= width + t))
        hidden, caches = step(
            model, params, joined.response[:, 0, t], joined.prompt_len + t, caches, visible, jnp.asarray(width + t)
        )
        close(logits(hidden[:, None])[:, 0], full[:, width + t], atol=1e-5)


# ---- devices -------------------------------------------------------------------------------------------------------

MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]


def everything(params, joined):
    """Hidden states, log-probs, scores and the gradients through both heads on one trunk."""
    model, tokens = Model(DECODER, logit_chunk=8 * 5), functional.join(joined)

    def total(params):
        logp, entropy = functional.token_logp(model, params, tokens, with_entropy=True)
        score = functional.response_scores(functional.scores(model, params, tokens), joined)
        hidden = functional.hidden_states(model, params, tokens) * tokens.segment[..., None]
        weight = jnp.cos(jnp.arange(logp.size)).reshape(logp.shape)
        return (weight * logp).sum() + 0.1 * entropy.sum() + score.sum(), (logp, entropy, score, hidden)

    return jax.grad(total, has_aux=True)(params)


@pytest.fixture(scope="module")
def two_heads(params, scalar_params):
    return {**params, "score": scalar_params["score"]}


@pytest.fixture(scope="module")
def on_one_device(two_heads):
    joined = batch([5, 1, 7, 3, 2, 6, 0, 4], [[4, 6], [6, 1], [2, 5], [1, 1], [3, 3], [6, 6], [0, 0], [2, 4]])
    return joined, jax.jit(everything)(two_heads, joined)


@pytest.mark.parametrize("shape", MESHES)
def test_devices_change_nothing(two_heads, on_one_device, shape):
    joined, (wanted_grads, wanted) = on_one_device
    mesh = mesh_of(*shape)
    shardings = functional.param_shardings(two_heads, mesh)
    placed = jax.device_put(two_heads, shardings)
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
    placed = jax.device_put(params, functional.param_shardings(params, mesh))
    assert placed["layers"]["attention"]["q"].addressable_shards[0].data.shape == part
    _, fsdp, tensor = shape
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(placed))
    whole = sum(x.size for x in jax.tree.leaves(params))
    norms = sum(x.size for x in jax.tree.leaves(params) if x.shape[-1:] == (32,) and x.ndim < 3 and x.shape[0] != 40)
    assert held == norms + (whole - norms) // (fsdp * tensor)


def test_an_axis_that_does_not_divide_is_whole():
    config = dataclasses.replace(DECODER, num_kv_heads=2)
    shardings = functional.param_shardings(functional.abstract_params(config), mesh_of(1, 2, 4))
    attention = shardings["layers"]["attention"]
    assert attention["k"].spec == P(None, "fsdp", None, None)
    assert attention["q"].spec == P(None, "fsdp", "tensor", None)
