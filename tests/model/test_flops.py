"""Counts against hand-computed ones, and against XLA's own where no loop hides anything from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.model import flops, functional
from mpo_jax.model.flops import Rows
from mpo_jax.model.functional import Model
from mpo_jax.plan.sizes import LLAMA_2_7B
from mpo_jax.types import Joined
from tests.model.tiny import DECODER


def test_the_matrices_of_llama_2_7b():
    """6,738,415,616 parameters: embedding and head, two norms a layer and one at the end, and the rest."""
    norms = (2 * 32 + 1) * 4096
    assert flops.layer_matrices(LLAMA_2_7B) == 6_738_415_616 - 2 * 32000 * 4096 - norms


def test_a_forward_pass_by_hand():
    """One layer, D 4, one head of 2, F 3, V 5: 2 rows of 3 prompt tokens and 2 responses of 2."""
    sizes = dataclasses.replace(
        DECODER, vocab_size=5, hidden_size=4, intermediate_size=3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2
    )
    rows = Rows(2, 3, 2, 2)
    matrices = 4 * 2 * 4 + 3 * 4 * 3
    # the prompt sees itself; each response sees the prompt and itself
    linear, attention = 2 * matrices * 2 * 7, 2 * (2 * 2 * (3 * 3 + 2 * (2 * 5)) * 2)
    assert flops.forward(sizes, rows, "vocab").flops == linear + attention + 2 * 4 * 5 * 2 * 4
    assert flops.forward(sizes, rows, "scalar").flops == linear + attention + 2 * 4 * 2 * 7
    train = flops.train(sizes, rows, "scalar", "full")
    assert train.flops == 3 * flops.forward(sizes, rows, "scalar").flops
    assert train.recomputed == linear + 1.5 * attention
    assert flops.train(sizes, rows, "scalar", "dots").recomputed == 0.5 * attention
    assert flops.prefill(sizes, rows).flops == 2 * matrices * 2 * 3 + 2 * (2 * 2 * 3 * 3 * 2)
    decode = flops.decode(sizes, rows, shards=2, bytes_each=2)
    assert decode.flops == 2 * 4 * (2 * (matrices + 20) + 4 * 2 * 5)
    assert decode.decode_reads == 2 * 2 * (2 * (matrices + 20) + 2 * 2 * 5 * 4)


@pytest.mark.parametrize("head", ["vocab", "scalar"])
def test_xla_counts_the_same(head):
    """One layer, so that the scan's body runs once; XLA also counts softmax, norms and the like."""
    sizes = dataclasses.replace(
        DECODER, num_layers=1, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=512,
    )  # fmt: skip
    rows = Rows(4, 32, 2, 16)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    batch = Joined(ints(4, 32), ints(4), ints(4, 2, 16), ints(4, 2), ints(4))  # type: ignore[arg-type]

    def run(params, batch):
        model = Model(sizes, logit_chunk=10**6)
        if head == "vocab":
            return functional.response_logps(model, params, batch)
        return functional.scores(model, params, functional.join(batch))

    params = functional.abstract_params(sizes, scalar=head == "scalar")
    counted = jax.jit(run).lower(params, batch).cost_analysis()["flops"]
    ours = flops.forward(sizes, rows, head).flops
    assert 0.8 * counted < ours <= counted


def test_what_rows_need_by_hand():
    """Two prompts of 3 and 1 tokens; responses of 2 and 1, and of none and 2: prompts once, keys that are seen."""
    sizes = dataclasses.replace(
        DECODER, vocab_size=5, hidden_size=4, intermediate_size=3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2
    )
    matrices = 4 * 2 * 4 + 3 * 4 * 3
    seen = (1 + 2 + 3) + (4 + 5) + 4 + 1 + (2 + 3)
    prompt, response = np.asarray([3, 1]), np.asarray([[2, 1], [0, 2]])
    shared = 2 * matrices * (4 + 5) + 4 * 2 * seen
    assert flops.necessary(sizes, prompt, response, "vocab") == shared + 2 * 4 * 5 * 5
    assert flops.necessary(sizes, prompt, response, "scalar") == shared + 2 * 4 * 3


def test_what_sampling_reads_by_hand():
    """The last token of each response is drawn and not read; matrices once a token of the longest response."""
    sizes = dataclasses.replace(
        DECODER, vocab_size=5, hidden_size=4, intermediate_size=3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2
    )
    matrices = 4 * 2 * 4 + 3 * 4 * 3 + 4 * 5
    work = flops.sampling(sizes, np.asarray([3, 1]), np.asarray([[3], [1]]), 2)
    assert work.decode_reads == 2 * (2 * matrices + 2 * 2 * (4 + 5))
    drawn = flops.necessary(sizes, np.asarray([3, 1]), np.asarray([[2], [0]]), "scalar")
    assert work.flops == drawn + 2 * 4 * 5 * 4
