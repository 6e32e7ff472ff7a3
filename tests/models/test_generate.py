"""mpo_jax.models.generate: the sampler's mathematics, agreement with the forward pass, and what must not matter."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.text import TextCodec
from mpo_jax.models import forward, generate, loading
from mpo_jax.models.decoder import fuse
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate, make_stream
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.types import PromptBatch, frozen
from tests.models.tiny import DECODER, batch, close, mesh_of, random_params

MODEL, EOS = Model(DECODER), 6
ALLOWED = np.arange(40) % 4 != 3
PROMPT_LEN = np.array([5, 1, 7, 3, 2, 6, 4, 7])

pick = jax.jit(generate.pick)
choose = jax.jit(generate.choose, static_argnums=2)


@jax.jit
def all_logits(params, joined):
    return forward.logits(MODEL, params, forward.join(joined))


keep_top_p = jax.jit(generate.keep_top_p)


@pytest.fixture(scope="module")
def params():
    return random_params(DECODER)


def prompts(lengths=PROMPT_LEN, width=None) -> PromptBatch:
    lengths = np.asarray(lengths)
    return batch(lengths, np.zeros((len(lengths), 1)), width=(width or 7, 0))


def rows(joined: PromptBatch, order) -> PromptBatch:
    return jax.tree.map(lambda x: x[order], joined)


def run(params, joined, *, sampling=None, shape=(1, 1, 1), seed=0, index=None, allowed=ALLOWED, ends=EOS):
    """What the generator gives over a mesh of that shape: the prompts with their samples, and has_eos [B N]."""
    mesh = mesh_of(*shape)
    function = make_generate(MODEL, sampling or Sampling(max_new_tokens=10, num_samples=2), ends, mesh)
    index = np.zeros(len(joined.key), np.uint32) if index is None else np.asarray(index, np.uint32)
    placed = jax.device_put(params, forward.param_shardings(params, mesh))
    allowed = None if allowed is None else jnp.asarray(allowed)
    with jax.set_mesh(mesh):
        return function(frozen(placed), place_batch(joined, mesh), jax.random.key(seed), index, allowed)


def sample(params, joined, **options):
    """The samples on the host: ids [B N S], lengths [B N], has_eos [B N]."""
    out, has_eos = run(params, joined, **options)
    np.testing.assert_array_equal(out.prompt, joined.prompt)
    return np.asarray(out.response), np.asarray(out.response_len), np.asarray(has_eos)


def same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def reference(params):
    """Eight prompts on one device; what the invariances compare with."""
    return sample(params, prompts())


# ---- one draw ------------------------------------------------------------------------------------------------------


def simplex(shape, *, zeros=0.3, seed=0):
    """Probability rows, a share of them exactly zero, some ids a thousand times likelier than others."""
    rng = np.random.default_rng(seed)
    p = rng.exponential(size=shape) * 10 ** rng.uniform(-3, 0, shape) * (rng.random(shape) > zeros)
    p[:, rng.integers(shape[1])] += 1e-3  # no row is empty
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 7, 128, 129, 500, 1000])
def test_pick_inverts_the_cumulative_sum(vocab):
    """The id that the float64 cumulative sum names, wherever u is not within rounding of one of its borders."""
    p = simplex((400, vocab))
    u = np.random.default_rng(1).random(400).astype(np.float32)
    cumulative = np.cumsum(p.astype(np.float64), -1)
    target = u * cumulative[:, -1]
    away = np.abs(cumulative - target[:, None]).min(-1) > 1e-6
    wanted = np.array([np.searchsorted(c, t, side="right") for c, t in zip(cumulative, target, strict=True)])
    assert away.mean() > 0.9
    picked = np.asarray(pick(p, u))
    np.testing.assert_array_equal(picked[away], wanted[away])
    assert np.abs(picked - wanted).max() <= vocab - 1 and (p[np.arange(400), picked] > 0).all()


def test_pick_at_exact_borders():
    """Sums of quarters are exact, so u at a border belongs to the id after it, across empty blocks too."""
    p = np.zeros((6, 520), np.float32)
    p[:, [140, 200, 399, 510]] = 0.25
    below = [float(np.nextafter(np.float32(x), np.float32(0))) for x in (0.25, 1.0)]
    assert pick(p, np.array([0.0, below[0], 0.25, 0.5, 0.75, below[1]], np.float32)).tolist() == [
        140, 140, 200, 399, 510, 510,
    ]  # fmt: skip


@pytest.mark.parametrize("column", [127, 255, 383, 499])
def test_pick_takes_nothing_impossible(column):
    """u within rounding of the end of a block whose last ids are impossible, where two sums can disagree."""
    p = simplex((500, 500))
    for end in (127, 255, 383, 499):
        p[:, end - 7 : end + 1] = 0
    cumulative = np.cumsum(p.astype(np.float64), -1)
    border = (cumulative[:, column] / cumulative[:, -1]).astype(np.float32)
    at = np.arange(500)
    before = np.where(p[:, :column] > 0, np.arange(column)[None], -1).max(-1)
    for ulps in range(-3, 4):
        u = np.clip(border + ulps * np.spacing(border), 0, np.nextafter(np.float32(1), np.float32(0)))
        picked = np.asarray(pick(p, u.astype(np.float32)))
        assert (p[at, picked] > 0).all()
        # nothing possible lies between the border's two neighbours; a draw that rounding spoils takes the likeliest id
        neighbour = (picked == before) | (cumulative[at, picked] - p[at, picked] <= cumulative[:, column] + 1e-6)
        assert (neighbour & (picked >= before) | (picked == p.argmax(-1))).all()


def test_pick_of_one_certain_id():
    p = np.zeros((4, 300), np.float32)
    p[np.arange(4), [0, 127, 128, 299]] = [1, 0.25, 3, 1e-20]
    for u in (0.0, 0.3, 1 - 2**-24):
        assert pick(p, np.full(4, u, np.float32)).tolist() == [0, 127, 128, 299]


@pytest.mark.thorough
def test_pick_has_the_right_frequencies():
    p = simplex((1, 300), seed=3)[0]
    u = np.asarray(jax.random.uniform(jax.random.key(0), (200_000,)))
    counts = np.zeros(300)
    for part in np.split(u, 20):
        counts += np.bincount(pick(np.broadcast_to(p, (len(part), 300)), part), minlength=300)
    assert not counts[p == 0].any()
    often = p * len(u) >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(p[often], p[~often].sum()).astype(np.float64) * len(u)
    statistic = ((observed - expected) ** 2 / expected)[expected > 0].sum()
    assert stats.chi2.sf(statistic, (expected > 0).sum() - 1) > 0.01
    wrong = np.roll(expected, 1)
    assert stats.chi2.sf(((observed - wrong) ** 2 / wrong)[wrong > 0].sum(), (wrong > 0).sum() - 1) < 1e-6


@given(st.floats(0.05, 0.99), st.integers(0, 1000))
def test_top_p_equals_the_sorted_definition(top_p, seed):
    """The fewest most likely ids that reach top_p; distinct probabilities, so that there is one such set."""
    p = simplex((3, 200), zeros=0.0, seed=seed)
    kept = np.asarray(keep_top_p(p, np.float32(top_p)))
    for row, row_kept in zip(p.astype(np.float64), kept, strict=True):
        order = np.argsort(-row)
        cumulative = np.cumsum(row[order])
        if np.abs(cumulative - top_p).min() < 1e-6:
            continue
        count = int(np.searchsorted(cumulative, top_p)) + 1
        wanted = np.zeros(200, bool)
        wanted[order[:count]] = True
        np.testing.assert_array_equal(row_kept > 0, wanted)
        np.testing.assert_array_equal(row_kept[wanted], row.astype(np.float32)[wanted])


def test_top_p_keeps_ties_and_always_the_best():
    p = np.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.15, 0.05]], np.float32)
    assert (np.asarray(keep_top_p(p, 0.4)) > 0).tolist() == [[True] * 4, [True] + [False] * 3, [True] + [False] * 3]
    assert (np.asarray(keep_top_p(p, 1e-6)) > 0).sum(-1).tolist() == [4, 1, 1]
    assert (np.asarray(keep_top_p(p, 0.79)) > 0).sum(-1).tolist() == [4, 4, 2]


def test_choose():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])
    greedy = Sampling(max_new_tokens=1, greedy=True)
    assert choose(logits, jnp.array([0.99, 0.99]), greedy).tolist() == [1, 0]
    assert choose(logits, jnp.array([0.99, 0.0]), Sampling(max_new_tokens=1)).tolist() == [2, 0]
    nucleus = Sampling(max_new_tokens=1, top_p=0.5)
    assert choose(logits, jnp.array([0.99, 0.99]), nucleus).tolist() == [1, 1]


# ---- against the full forward pass ---------------------------------------------------------------------------------


def test_greedy_takes_the_full_forwards_argmax(params):
    ids, length, _ = sample(params, prompts(), sampling=Sampling(max_new_tokens=10, greedy=True), allowed=None)
    joined = dataclasses.replace(prompts(), response=ids, response_len=length)
    logits = np.asarray(all_logits(params, joined))
    for b in range(len(ids)):
        for t in range(length[b, 0]):
            column = 7 + t - 1 if t else PROMPT_LEN[b] - 1
            top = np.sort(logits[b, column])[-2:]
            assert top[1] - top[0] > 1e-4, "no tie that rounding could turn"
            assert ids[b, 0, t] == logits[b, column].argmax()


@pytest.mark.thorough
def test_samples_follow_the_scored_distribution(params):
    """First tokens of many visits of one prompt, against exp(token_logp) under temperature and banned ids."""
    temperature, visits = 0.7, 4096
    one = prompts([4])
    many = jax.tree.map(lambda x: np.repeat(x, visits, 0), one)
    sampling = Sampling(max_new_tokens=1, num_samples=2, temperature=temperature)
    ids, length, has_eos = sample(params, many, sampling=sampling, index=np.arange(visits))
    assert (length == 1).all(), "also where the first token is the last that fits"
    np.testing.assert_array_equal(has_eos, ids[:, :, 0] == EOS)
    every = dataclasses.replace(
        one, response=np.arange(40, dtype=np.int32)[None, :, None], response_len=np.ones((1, 40), np.int32)
    )
    logp, _ = forward.token_logp(
        MODEL, params, forward.join(every), temperature=temperature, allowed_V=jnp.asarray(ALLOWED)
    )
    expected = np.exp(np.asarray(logp[0], np.float64)) * ids.size
    counts = np.bincount(ids.ravel(), minlength=40)
    assert not counts[~ALLOWED].any()
    often = expected >= 5
    assert often.sum() > 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert stats.chi2.sf(statistic, often.sum() - 1) > 0.01


def test_sampled_ids_are_the_draws_of_the_full_forward(params, reference):
    """Each token is the inverse-CDF draw, with its own random number, from what the full forward pass gives there."""
    ids, length, _ = reference
    joined = dataclasses.replace(prompts(), response=ids, response_len=length)
    logits = np.asarray(all_logits(params, joined), np.float64)
    p = np.where(ALLOWED, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    cumulative = np.cumsum(p / p.sum(-1, keepdims=True), -1)
    close_calls = 0
    for b in range(8):
        for n in range(2):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), joined.key[b]), n)
            for t in range(length[b, n]):
                u = float(jax.random.uniform(jax.random.fold_in(key, t)))
                row = cumulative[b, 7 + 10 * n + t - 1 if t else PROMPT_LEN[b] - 1]
                if np.abs(row - u).min() < 1e-5:
                    close_calls += 1
                    continue
                assert ids[b, n, t] == np.searchsorted(row, u, side="right")
    assert close_calls <= 1


# ---- what must not matter ------------------------------------------------------------------------------------------


def test_batch_size_does_not_matter(params, reference):
    halves = [sample(params, rows(prompts(), np.arange(start, start + 4))) for start in (0, 4)]
    same([np.concatenate(parts) for parts in zip(*halves, strict=True)], reference)


def test_order_does_not_matter(params, reference):
    order = np.array([3, 0, 7, 5, 1, 2, 6, 4])
    same(sample(params, rows(prompts(), order)), [x[order] for x in reference])


def test_prompt_padding_does_not_matter(params, reference):
    same(sample(params, prompts(width=12)), reference)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_devices_do_not_matter(params, reference, shape):
    """Every device holds its rows' results, so that scoring goes on where sampling stopped."""
    out, has_eos = run(params, prompts(), shape=shape)
    same((out.response, out.response_len, has_eos), reference)
    part = 8 // (shape[0] * shape[1])
    assert out.response.addressable_shards[0].data.shape == (part, 2, 10)
    assert has_eos.addressable_shards[0].data.shape == (part, 2)


@pytest.mark.optimised
@pytest.mark.thorough
def test_weights_are_gathered_once_and_not_for_every_token(params):
    """No loop of the decode program moves weights: they come together before it. As they lie, each layer would."""
    mesh = mesh_of(1, 8, 1)
    placed = jax.device_put(params, forward.param_shardings(params, mesh))
    decoder = generate.Decoder(MODEL, Sampling(max_new_tokens=10), EOS)

    def decode(params, state, gathered):
        weights = forward.for_decoding(MODEL, params)
        if not gathered:
            cut = [fuse(jax.tree.map(lambda x, i=i: x[i], params["layers"])) for i in range(DECODER.num_layers)]
            weights = {**weights, "layers": cut}
        return decoder.advance(weights, state, None).ids

    def gathers_in_loops(gathered: bool) -> int:
        text = jax.jit(decode, static_argnums=2).lower(placed, state, gathered).compile().as_text()
        computations = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
        bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
        assert bodies <= computations.keys() and " all-gather" in text
        return sum(len(re.findall(r" all-gather(?:-start)?\(", computations[body])) for body in bodies)

    with jax.set_mesh(mesh):
        joined = place_batch(prompts(), mesh)
        state = jax.jit(decoder.begin)(frozen(placed), joined, jax.random.key(0), jnp.zeros_like(joined.key), None)
        assert gathers_in_loops(True) == 0 < gathers_in_loops(False)


def test_number_of_samples_does_not_matter(params, reference):
    """Two samples of one visit are the two visits of one sample each; sample n of visit i draws from i N + n."""
    single = Sampling(max_new_tokens=10)
    for n in range(2):
        alone = sample(params, prompts(), sampling=single, index=np.full(8, n))
        same(alone, [x[:, n : n + 1] for x in reference])


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [1, 4, 10, 50])
def test_a_stream_grows_to_the_same_samples(params, reference, chunk):
    """Every look shows the final samples up to where they are, and the last one all of them."""
    stream = make_stream(MODEL, Sampling(max_new_tokens=10, num_samples=2), EOS, chunk)
    index = np.zeros(8, np.uint32)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        looks = [
            [np.asarray(x) for x in (joined.response, joined.response_len, has_eos)]
            for joined, has_eos, _ in stream(frozen(params), prompts(), jax.random.key(0), index, jnp.asarray(ALLOWED))
        ]
    same(looks[-1], reference)
    assert len(looks) == 1 + -(-(reference[1].max() - 1) // chunk)
    for number, (ids, length, _) in enumerate(looks):
        drawn = min(1 + number * chunk, 10)
        np.testing.assert_array_equal(length, np.minimum(reference[1], drawn))
        np.testing.assert_array_equal(ids, np.where(np.arange(10) < drawn, reference[0], 0))


def test_what_does_matter(params, reference):
    """Seed, visit, sample and prompt key each give other samples; the same ones give the same."""
    same(sample(params, prompts()), reference)
    ids = reference[0]
    assert (ids[:, 0] != ids[:, 1]).any(-1).mean() > 0.8
    assert (sample(params, prompts(), index=np.ones(8))[0] != ids).any(-1).mean() > 0.8
    assert (sample(params, prompts(), seed=1)[0] != ids).any(-1).mean() > 0.8
    other_keys = dataclasses.replace(prompts(), key=prompts().key + np.uint32(2**31))
    assert (sample(params, other_keys)[0] != ids).any(-1).mean() > 0.8


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_rows_end_at_eos(reference):
    """EOS is the last token and counts; nothing follows it; a row that fills its columns has not ended."""
    ids, length, has_eos = reference
    assert ids.dtype == length.dtype == np.int32 and has_eos.dtype == bool
    assert 0 < has_eos.mean() < 1, "the case has rows of both kinds"
    for row, row_length, ended in zip(ids.reshape(16, 10), length.ravel(), has_eos.ravel(), strict=True):
        where = np.flatnonzero(row == EOS)
        assert ended == bool(len(where))
        assert row_length == (where[0] + 1 if ended else 10)
        assert not row[row_length:].any()


@pytest.mark.thorough
def test_of_several_ends_the_first_that_comes_counts(params, reference):
    """The samples are those of one end, cut at whichever comes first: random numbers depend on neither."""
    other = 10
    whole = sample(params, prompts(), ends=-1)[0].reshape(16, 10)
    ids, length, has_eos = (x.reshape(16, -1) for x in sample(params, prompts(), ends=(EOS, other)))
    found = set()
    for row, row_length, ended, drawn in zip(ids, length[:, 0], has_eos[:, 0], whole, strict=True):
        where = np.flatnonzero(np.isin(drawn, (EOS, other)))
        assert ended == bool(len(where)) and row_length == (where[0] + 1 if ended else 10)
        assert row[:row_length].tolist() == drawn[:row_length].tolist() and not row[row_length:].any()
        found |= {int(row[row_length - 1])} if ended else set()
    assert found == {EOS, other}, "the case has rows of both ends"
    assert has_eos.mean() > reference[2].mean()


def test_a_single_end_compiles_to_the_same_program_in_either_form(params):
    mesh = mesh_of(1, 1, 1)

    def program(ends):
        decoder = generate.Decoder(MODEL, Sampling(max_new_tokens=10), ends)
        with jax.set_mesh(mesh):
            joined = place_batch(prompts(), mesh)
            arguments = frozen(params), joined, jax.random.key(0), jnp.zeros(8, jnp.uint32), jnp.asarray(ALLOWED)
            return jax.jit(decoder.begin).lower(*arguments).as_text()

    assert program(EOS) == program((EOS,)) != program((EOS, 10))


def test_eos_at_once(params):
    """Where only EOS is allowed all rows have length 1 and an end."""
    ids, length, has_eos = sample(params, prompts(), allowed=np.arange(40) == EOS)
    assert (length == 1).all() and has_eos.all() and (ids[:, :, 0] == EOS).all() and not ids[:, :, 1:].any()


def test_a_shorter_limit_cuts(params, reference):
    """The same tokens up to the limit; EOS in the last column is still an end, a row cut there has none."""
    ids, length, has_eos = reference
    limit = int(length[has_eos & (length > 1)].max())
    assert has_eos[length == limit].any() and (length > limit).any(), "the case has rows of both kinds"
    cut = sample(params, prompts(), sampling=Sampling(max_new_tokens=limit, num_samples=2))
    same(cut, (ids[:, :, :limit], np.minimum(length, limit), has_eos & (length <= limit)))


def test_banned_ids_are_never_sampled(params, reference):
    ids, length, _ = reference
    kept = np.arange(10)[None, None] < length[..., None]
    assert ALLOWED[ids[kept]].all()
    free, free_length, _ = sample(params, prompts(), allowed=np.ones(40, bool))
    kept = np.arange(10)[None, None] < free_length[..., None]
    assert not ALLOWED[free[kept]].all(), "they are sampled where they are allowed"


def test_filler_rows_are_empty_and_harmless(params, reference):
    filled = prompts()
    filled = dataclasses.replace(filled, prompt_len=np.where(np.arange(8) % 3 == 1, 0, filled.prompt_len))
    ids, length, has_eos = sample(params, filled)
    filler = np.arange(8) % 3 == 1
    assert not length[filler].any() and not ids[filler].any() and not has_eos[filler].any()
    same([x[~filler] for x in (ids, length, has_eos)], [x[~filler] for x in reference])


def test_a_batch_of_filler_alone(params):
    ids, length, has_eos = sample(params, dataclasses.replace(prompts(), prompt_len=np.zeros(8, np.int32)))
    assert not ids.any() and not length.any() and not has_eos.any()


def test_prefill_state_predicts_the_first_token(params):
    """Hidden states at each prompt's last token, repeated for the samples; caches with room for the response."""
    prefill = jax.jit(generate.prefill, static_argnums=0, static_argnames=("num_samples", "room"))
    hidden, caches = prefill(MODEL, params, prompts([5, 2]), num_samples=3, room=4)
    assert hidden.shape == (6, 32) and len(caches) == DECODER.num_layers
    assert {x.shape for x in jax.tree.leaves(caches)} == {(6, 4, 11, 6)}
    tokens = forward.join(batch([5, 2], [[1], [1]], width=(7, 1)))
    full = jax.jit(forward.hidden_states, static_argnums=0)(MODEL, params, tokens)
    for b, length in enumerate([5, 2]):
        close(hidden[3 * b : 3 * b + 3], jnp.repeat(full[b, length - 1][None], 3, 0), atol=1e-5)


# ---- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_stories_model_tells_its_story(shared_data):
    folder = shared_data / "models" / "stories260K"
    text = TextConfig(max_prompt_tokens=32, max_response_tokens=60)
    codec = TextCodec(load_tokenizer(folder), text)
    mesh = mesh_of(1, 1, 1)
    model, params = loading.load(folder, loading.Options(), mesh, text=text)
    ids = codec.prompt("Once upon a time, there was").ids
    joined = PromptBatch(
        prompt=np.array([ids + [0] * (32 - len(ids))], np.int32),
        prompt_len=np.array([len(ids)], np.int32),
        response=np.zeros((1, 1, 0), np.int32),
        response_len=np.zeros((1, 1), np.int32),
        key=np.zeros(1, np.uint32),
    )
    function = make_generate(model, Sampling(max_new_tokens=60, greedy=True), codec.eos_id, mesh)
    allowed = jnp.asarray(codec.allowed(model.decoder.vocab_size))
    with jax.set_mesh(mesh):
        out, _ = function(params, joined, jax.random.key(0), np.zeros(1, np.uint32), allowed)
    story = codec.decode(np.asarray(out.response[0, 0, : int(out.response_len[0, 0])]))
    assert story.startswith(
        " a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )
