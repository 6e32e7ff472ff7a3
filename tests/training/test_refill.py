"""mpo_jax.training.refill: the samples of every prompt, whatever the rows they were drawn in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.data.batches import Buckets, Widths, collate
from mpo_jax.data.tokens import Example
from mpo_jax.errors import NotFinite, UserError
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.training.refill import sample_all, with_responses
from mpo_jax.types import frozen
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
    params, examples, *, progress=None, shape=(1, 1, 1), batch_size=8, buckets=2, sampling=SAMPLING, allowed=ALLOWED
):
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
            progress=progress,
        )
    return found


@pytest.fixture(scope="module")
def reference(params, examples):
    return sample(params, examples)


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


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


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 64}, {"buckets": 1}, {"buckets": 4}])
def test_rows_and_widths_do_not_matter(params, examples, reference, options):
    same(sample(params, examples, **options), reference)


def test_order_does_not_matter(params, examples, reference):
    order = np.random.default_rng(1).permutation(COUNT)
    found = sample(params, [examples[e] for e in order])
    same(found, [x[order] for x in reference])


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
