"""Every family through every path of the decoder: sampling, prompt-shared rows, meshes. Weights are transformers'.

That they mean what transformers says they mean is in test_weights.py: recorded answers of each.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.types import Params, frozen
from tests.covering import covering
from tests.models.tiny import FAST, RECORDED, batch, check_cached_decoding, close, load_folder, mesh_of, trees_close

# dozens of programs, each of which runs once
pytestmark = pytest.mark.thorough

FAMILIES = ("gemma2", "gemma3", "olmo2", "gpt_neox", "yarn")

all_logits = jax.jit(forward.logits, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def token_logp(model, params, joined):
    return forward.token_logp(model, params, forward.join(joined))[0]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """Sizes and parameters, and prompts of unlike lengths, beyond every window, with two responses each."""
    return *load_folder(RECORDED / request.param), batch([9, 1, 7, 5], [[6, 4], [3, 6], [6, 1], [2, 2]], width=(9, 6))


@partial(jax.jit, static_argnums=0)
def gradients(model, params, joined):
    def total(params):
        logp, entropy = forward.token_logp(model, params, forward.join(joined), with_entropy=True)
        return (jnp.cos(jnp.arange(logp.size)).reshape(logp.shape) * logp + 0.3 * entropy).sum()

    return jax.grad(total)(params)


def test_responses_behind_one_prompt_equal_rows_of_their_own(case):
    config, params, joined = case
    together = np.asarray(token_logp(Model(config), params, joined)).reshape(joined.response.shape)
    for n in range(2):
        of_one = slice(n, n + 1)
        alone = dataclasses.replace(
            joined, response=joined.response[:, of_one], response_len=joined.response_len[:, of_one]
        )
        close(together[:, n], token_logp(Model(config), params, alone), atol=1e-5)


def test_log_probs_are_those_of_the_logits(case):
    """Through the chunks of `token_logp`, capped or not; and with the other implementation of attention."""
    config, params, joined = case
    tokens = forward.join(joined)
    logp = token_logp(Model(config, logit_chunk=8), params, joined)
    logits = all_logits(Model(config, attention="xla"), params, tokens)
    before = np.asarray(forward.predecessor(tokens))[:, tokens.scored_from :]
    at = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits, -1)), before[..., None], 1)
    ids = np.asarray(tokens.ids)[:, tokens.scored_from :]
    wanted = np.take_along_axis(at, ids[..., None], -1)[..., 0]
    mask = np.asarray(tokens.loss_mask)[:, tokens.scored_from :]
    close(logp, np.where(mask, wanted, 0.0), atol=1e-5)


def test_decoding_with_a_cache_equals_the_full_forward(case):
    """Behind prompts of several lengths, with garbage in the slots still to be written."""
    config, params, _ = case
    check_cached_decoding(Model(config), params, batch([4, 9, 1], [[8], [8], [8]], width=(9, 8)))


@pytest.mark.parametrize(("case", "remat"), covering(FAMILIES, ("dots", "full")), indirect=["case"])
def test_recomputation_changes_no_gradient(case, remat):
    config, params, joined = case
    trees_close(gradients(Model(config, remat=remat), params, joined), gradients(Model(config), params, joined))


def sampled(model: Model, params: Params, joined, mesh) -> np.ndarray:
    prompts = dataclasses.replace(joined, response=joined.response[..., :0], response_len=0 * joined.response_len)
    sample = make_generate(model, Sampling(max_new_tokens=8, greedy=True), -1, mesh)
    allowed = jnp.ones(model.decoder.vocab_size, bool)
    with jax.set_mesh(mesh):
        drawn, _ = sample(params, place_batch(prompts, mesh), jax.random.key(0), np.zeros(4, np.int32), allowed)
    return np.asarray(drawn.response)[:, 0]


@pytest.mark.parametrize(("case", "axes"), covering(FAMILIES, ((2, 2, 2), (1, 1, 4))), indirect=["case"])
def test_meshes_change_nothing(case, axes):
    """Gradients, scores of the model's trunk, and greedy samples. Four devices do not divide the two key heads."""
    config, params, joined = case
    model, mesh = Model(config, remat="dots"), mesh_of(*axes)
    wanted = gradients(model, params, joined)
    placed = jax.device_put(params, forward.param_shardings(params, mesh))
    with jax.set_mesh(mesh):
        divided = jax.jit(gradients.__wrapped__, static_argnums=0, compiler_options=FAST)
        found = divided(model, placed, place_batch(joined, mesh))
    trees_close(found, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(
        sampled(model, frozen(placed), joined, mesh), sampled(model, frozen(params), joined, mesh_of(1, 1, 1))
    )


def test_bfloat16_is_near_float32(case):
    config, params, joined = case
    tokens = forward.join(joined)
    real = np.asarray(tokens.segment) > 0
    wanted = np.asarray(all_logits(Model(config), params, tokens))[real]
    found = np.asarray(all_logits(Model(config, dtype="bfloat16"), params, tokens))[real]
    assert np.abs(found - wanted).mean() < 0.05 * wanted.std()
