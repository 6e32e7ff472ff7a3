"""mpo_jax.models.responses: the same numbers from packed rows as from padded ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.data.packing import Packing, pack
from mpo_jax.data.tokens import Example
from mpo_jax.evaluation.scoring import score_examples
from mpo_jax.models import responses
from mpo_jax.models.forward import Model
from mpo_jax.types import trainable
from tests.models.tiny import DECODER, close, mesh_of, of_family, random_params

SIZES = [(4, 9, 1), (3, 2, 2), (6, 1, 9), (5, 5, 4), (2, 8, 3)]


def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(0, DECODER.vocab_size, n, np.int32)  # noqa: E731
    return [Example(ids(p), [ids(a), ids(b)]) for p, a, b in SIZES]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("head", ["lm", "value"])
def test_scores_of_packed_rows_are_those_of_padded_ones(family, head):
    """In batches of two, the last one filled up; with windows and soft caps too, which count positions."""
    model, mesh = Model(of_family(family)), mesh_of(1, 1, 1)
    params = trainable(random_params(model.decoder, head=head))
    with jax.set_mesh(mesh):
        padded, packed = (
            score_examples(
                model, params, examples(), head=head, batch_size=2, length_buckets=2, mesh=mesh, packing=packing
            )
            for packing in (None, Packing(2, 24))
        )
    assert packed.shape == (5, 2)
    close(packed, padded, rtol=2e-5, atol=2e-5)


def test_what_is_not_in_a_micro_batch_is_0_and_does_not_count():
    model, params = Model(DECODER), random_params(DECODER)
    packed = jax.tree.map(jnp.asarray, pack(examples(), Packing(1, 24), num_responses=2))
    rows = packed.rows(jnp.asarray(1))
    valid_B = np.asarray(responses.valid(rows))
    assert valid_B.tolist() == (packed.micro == 1).tolist() and 0 < valid_B.sum() < 5
    logp_BN = np.asarray(responses.logps(model, params, rows))
    assert (logp_BN[~valid_B] == 0).all() and (logp_BN[valid_B] < 0).all()
    assert responses.usage(rows)["tokens"] == (packed.segment[1] > 0).sum()
