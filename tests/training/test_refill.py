"""mpo_jax.training.refill: the samples of every prompt, whatever the rows they were drawn in."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.data.batches import Buckets, Widths, collate
from mpo_jax.data.tokens import Example
from mpo_jax.errors import NotFinite, PassPreempted, UserError
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.runtime.parts import Parts
from mpo_jax.runtime.passes import Pass
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.training.refill import programs, sample_all, with_responses
from mpo_jax.types import frozen
from tests.covering import the_rest_thorough
from tests.models.tiny import DECODER, mesh_of, random_params

MODEL, EOS = Model(DECODER), 6
ALLOWED = np.arange(40) % 4 != 3
SAMPLING = Sampling(max_new_tokens=40, num_samples=2)
COUNT = 37


@pytest.fixture(scope="module")
def params():
    return random_params(DECODER)


@pytest.fixture(scope="module")
def examples():
    """Prompts of unlike lengths, no two alike."""
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 40, rng.integers(1, 15)).astype(np.int32), []) for _ in range(COUNT)]


def sample(
    params, examples, *, progress=None, shape=(1, 1, 1), batch_size=8, buckets=2, sampling=SAMPLING, allowed=ALLOWED,
    keep=None,
):  # fmt: skip
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        found = sample_all(
            MODEL,
            frozen(jax.device_put(params, forward.param_shardings(params, mesh))),
            examples,
            sampling=sampling,
            eos_id=EOS,
            allowed_V=jnp.asarray(allowed),
            key=jax.random.key(0),
            buckets=Buckets.of(examples, buckets),
            batch_size=batch_size,
            mesh=mesh,
            keep=keep,
            progress=progress,
        )
    return found


@pytest.fixture(scope="module")
def reference(params, examples):
    return sample(params, examples)


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
def test_the_samples_are_those_of_one_fixed_batch(params, examples, reference):
    """Drawn side by side without refilling, to the token."""
    mesh = mesh_of(1, 1, 1)
    batch = collate(examples, Widths.of(examples), num_responses=0)
    with jax.set_mesh(mesh):
        joined, has_eos = make_generate(MODEL, SAMPLING, EOS, mesh)(
            frozen(params),
            place_batch(batch, mesh),
            jax.random.key(0),
            jnp.zeros(COUNT, jnp.uint32),
            jnp.asarray(ALLOWED),
        )
    same(reference, (joined.response, joined.response_len, has_eos))
    assert len(np.unique(reference.length)) > 5 and 0 < reference.has_eos.mean() < 1, "the case is ragged"


@pytest.mark.parametrize(
    "options", the_rest_thorough([{"batch_size": 3}, {"buckets": 4}, {"batch_size": 64}, {"buckets": 1}], 2)
)
def test_rows_and_widths_do_not_matter(params, examples, reference, options):
    same(sample(params, examples, **options), reference)


def test_order_does_not_matter(params, examples, reference):
    order = np.random.default_rng(1).permutation(COUNT)
    found = sample(params, [examples[e] for e in order])
    same(found, [x[order] for x in reference])


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_devices_do_not_matter(params, examples, reference, shape):
    same(sample(params, examples, shape=shape), reference)


def test_rows_that_end_at_once_are_taken(params, examples):
    found = sample(params, examples, allowed=np.arange(40) == EOS)
    assert (found.length == 1).all() and found.has_eos.all() and (found.ids[..., 0] == EOS).all()


def test_one_token_a_sample(params, examples, reference):
    found = sample(params, examples, sampling=Sampling(max_new_tokens=1, num_samples=2))
    np.testing.assert_array_equal(found.ids, reference.ids[..., :1])


def test_fewer_steps_than_fixed_batches_would_take(params, examples, reference, monkeypatch):
    """Chunks decoded, against those of batches of eight that each wait for their longest sample."""
    from mpo_jax.training import refill

    calls, make = [], refill.programs

    def counting(*arguments):
        start, insert, advance = make(*arguments)
        return start, insert, lambda *inputs: (calls.append(1), advance(*inputs))[1]

    monkeypatch.setattr(refill, "programs", counting)
    same(sample(params, examples, buckets=1), reference)
    longest = [reference.length[begin : begin + 8].max() for begin in range(0, COUNT, 8)]
    assert len(calls) < sum(-(-(n - 1) // 16) for n in longest)


def test_progress_is_told_by_prompts(params, examples, reference):
    told = []
    sample(params, examples, progress=lambda done, metrics: told.append((done, metrics)))
    done = [prompts for prompts, _ in told]
    assert done == [8, 16, 24, 32, 37]
    assert sum(metrics["tokens"] for _, metrics in told) == reference.length.sum()
    rate = sum(n * metrics["eos_rate"] for n, (_, metrics) in zip(np.diff([0, *done]), told, strict=True)) / COUNT
    np.testing.assert_allclose(rate, reference.has_eos.mean())


def test_responses_are_cut_to_their_lengths(examples, reference):
    answered = with_responses(examples, reference)
    for example, answer, ids, length in zip(examples, answered, reference.ids, reference.length, strict=True):
        assert answer.prompt is example.prompt
        assert [list(x) for x in answer.responses] == [list(row[:n]) for row, n in zip(ids, length, strict=True)]


def test_no_prompts(params):
    with pytest.raises(UserError, match="there are no prompts"):
        sample_all(
            MODEL, frozen(params), [], sampling=SAMPLING, eos_id=EOS, allowed_V=jnp.asarray(ALLOWED),
            key=jax.random.key(0), buckets=None, batch_size=8, mesh=mesh_of(1, 1, 1),
        )  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_ends_it_at_once(params, examples, reference, value):
    """One row of the head is damaged: nothing else would show it but the samples."""
    head = np.array(params["head"])
    seen = []
    damaged = {**params, "head": jnp.asarray(np.where(np.arange(head.shape[1]) == 5, value, head))}
    with pytest.raises(NotFinite, match=r"the model: the logits of its next tokens are not finite"):
        sample(damaged, examples, progress=lambda *_: seen.append(_))
    assert not seen
    # an id that is never sampled does not count
    harmless = {**params, "head": jnp.asarray(np.where(np.arange(head.shape[1]) == 3, value, head))}
    same(sample(harmless, examples), reference)


# ---- going on after a kill -----------------------------------------------------------------------------------------


class Kill(Exception):
    """Ends a pass without a word."""


def interrupted(params, examples, folder, calls, *, told=None, **options):
    """One run of the pass, ended after that many chunks; None: to its end."""
    with Pass("samples", COUNT, Parts(folder, {}, minutes=0), every=8) as keep:
        before, check, left = keep.done, keep.check, [calls]

        def counting():
            check()
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    raise Kill

        keep.check = counting
        progress = None if told is None else lambda done, metrics: told.append((done, metrics))
        if told is not None:
            # as the tracker drops lines of rows that are made again
            told[:] = [line for line in told if line[0] <= keep.reported]
        return sample(params, examples, keep=keep, progress=progress, **options), before


def test_after_any_kill_it_goes_on_to_the_same_samples_and_the_same_sums(params, examples, reference, tmp_path):
    told, done = [], [0]
    for calls in (1, 3, 1, 4, 2):
        with pytest.raises(Kill):
            interrupted(params, examples, tmp_path, calls, told=told)
        done.append(Parts(tmp_path, {}, minutes=0).rows)
    found, before = interrupted(params, examples, tmp_path, None, told=told)
    assert done == sorted(done) and 0 < before == done[-1] < COUNT, done
    same(found, reference)
    assert [prompts for prompts, _ in told] == [8, 16, 24, 32, 37]
    assert sum(metrics["tokens"] for _, metrics in told) == reference.length.sum()
    again, before = interrupted(params, examples, tmp_path, None)
    assert before == COUNT
    same(again, reference)


def test_what_is_finished_is_not_sampled_again(params, examples, reference, tmp_path, monkeypatch):
    from mpo_jax.training import refill

    with pytest.raises(Kill):
        interrupted(params, examples, tmp_path, 6)
    kept = np.concatenate([entry["prompt"] for entry in Parts(tmp_path, {}, minutes=0).entries])
    begun, collate_rows = [], refill.collate
    monkeypatch.setattr(
        refill, "collate", lambda rows, *args, **named: (begun.extend(rows), collate_rows(rows, *args, **named))[1]
    )
    same(interrupted(params, examples, tmp_path, None)[0], reference)
    assert len(begun) == COUNT - len(kept)
    assert not {example.fingerprint for example in begun} & {examples[e].fingerprint for e in kept}


@pytest.mark.thorough
def test_it_goes_on_on_another_mesh(params, examples, reference, tmp_path):
    with pytest.raises(Kill):
        interrupted(params, examples, tmp_path, 6)
    found, before = interrupted(params, examples, tmp_path, None, shape=(2, 2, 2))
    assert 0 < before < COUNT
    same(found, reference)


def test_sigterm_ends_it_between_two_chunks(params, examples, reference, tmp_path):
    def progress(done, metrics):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(PassPreempted), Pass("samples", COUNT, Parts(tmp_path, {}, minutes=60)) as keep:
        sample(params, examples, keep=keep, progress=progress)
    found, before = interrupted(params, examples, tmp_path, None)
    assert 8 <= before < COUNT
    same(found, reference)


@pytest.mark.thorough
def test_a_row_s_bits_depend_on_neither_its_place_nor_its_neighbours(params, examples):
    """What lets a run go on with other prompts beside the unfinished ones: tokens, keys and values, to the bit."""
    mesh, key, endless = mesh_of(1, 1, 1), jax.random.key(0), jnp.asarray(ALLOWED & (np.arange(40) != EOS))
    start, insert, advance = programs(MODEL, Sampling(max_new_tokens=300, num_samples=2), EOS, mesh)
    weights, widths = forward.for_decoding(MODEL, params), Widths.of(examples)

    def drawn(prompt, neighbours, before, row):
        """All that three chunks make of a prompt's two rows, which begin after their neighbours' first chunks."""

        def put(state, chosen, row):
            batch = place_batch(collate([examples[chosen]], widths, num_responses=0), mesh)
            if state is None:
                state = start(frozen(params), batch, key, endless, 8)
            return insert(frozen(params), state, batch, np.asarray([row, row + 1], np.int32), key, endless)

        state = None
        with jax.set_mesh(mesh):
            for other, place in zip(neighbours, [r for r in range(0, 8, 2) if r != row], strict=True):
                state = put(state, other, place)
            for _ in range(before):
                state, _ = advance(weights, state, endless)
            state = put(state, prompt, row)
            for _ in range(3):
                state, _ = advance(weights, state, endless)
        assert (np.asarray(state.length[row : row + 2]) == 49).all()
        left = state.ids, state.length, *jax.tree.leaves(state.caches)
        return [np.asarray(x)[row : row + 2] for x in left]

    alone = drawn(5, [0, 1, 2], before=0, row=0)
    for neighbours, before, row in (([3, 4, 6], 0, 4), ([7, 8, 9], 1, 6), ([0, 1, 2], 12, 2)):
        for one, other in zip(drawn(5, neighbours, before, row), alone, strict=True):
            np.testing.assert_array_equal(one, other)
