"""Counts against hand-computed ones, and against XLA's own where no loop hides anything from it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mpo_jax.models import flops, forward
from mpo_jax.models.flops import Rows
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import weights
from mpo_jax.models.spec import DecoderConfig, LayerSpec
from mpo_jax.runtime.sharding import device_bytes
from mpo_jax.stages.shapes import shaped
from mpo_jax.tools.plan.sizes import LLAMA_2_7B
from mpo_jax.types import PromptBatch
from tests.models.tiny import DECODER, mesh_of, with_layers


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
    assert flops.forward(sizes, rows, "lm").flops == linear + attention + 2 * 4 * 5 * 2 * 4
    assert flops.forward(sizes, rows, "value").flops == linear + attention + 2 * 4 * 2 * 7
    train = flops.train(sizes, rows, "value", "full")
    assert train.flops == 3 * flops.forward(sizes, rows, "value").flops
    assert train.recomputed == linear + 1.5 * attention
    assert flops.train(sizes, rows, "value", "dots").recomputed == 0.5 * attention
    assert flops.prefill(sizes, rows).flops == 2 * matrices * 2 * 3 + 2 * (2 * 2 * 3 * 3 * 2)
    decode = flops.decode(sizes, rows, shards=2, bytes_each=2)
    assert decode.flops == 2 * 4 * (2 * (matrices + 20) + 4 * 2 * 5)
    assert decode.decode_reads == 2 * 2 * (2 * (matrices + 20) + 2 * 2 * 5 * 4)


def test_a_layer_without_a_gate_has_two_matrices_in_its_mlp():
    plain = with_layers(DECODER, LayerSpec(gated=False))
    gate = DECODER.num_layers * DECODER.hidden_size * DECODER.intermediate_size
    assert flops.layer_matrices(plain) == flops.layer_matrices(DECODER) - gate


@pytest.mark.parametrize("head", ["lm", "value"])
def test_xla_counts_the_same(head):
    """One layer, so that the scan's body runs once; XLA also counts softmax, norms and the like."""
    sizes = dataclasses.replace(
        DECODER, num_layers=1, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=512,
    )  # fmt: skip
    rows = Rows(4, 32, 2, 16)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    batch = PromptBatch(ints(4, 32), ints(4), ints(4, 2, 16), ints(4, 2), ints(4))  # type: ignore[arg-type]

    def run(params, batch):
        model = Model(sizes, logit_chunk=10**6)
        if head == "lm":
            return forward.response_logps(model, params, batch)
        return forward.scores(model, params, forward.join(batch))

    params = forward.abstract_params(sizes, head=head)
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
    assert flops.necessary(sizes, prompt, response, "lm") == shared + 2 * 4 * 5 * 5
    assert flops.necessary(sizes, prompt, response, "value") == shared + 2 * 4 * 3


def test_what_sampling_reads_by_hand():
    """The last token of each response is drawn and not read; matrices once a token of the longest response."""
    sizes = dataclasses.replace(
        DECODER, vocab_size=5, hidden_size=4, intermediate_size=3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2
    )
    matrices = 4 * 2 * 4 + 3 * 4 * 3 + 4 * 5
    work = flops.sampling(sizes, np.asarray([3, 1]), np.asarray([[3], [1]]), 2)
    assert work.decode_reads == 2 * (2 * matrices + 2 * 2 * (4 + 5))
    drawn = flops.necessary(sizes, np.asarray([3, 1]), np.asarray([[2], [0]]), "value")
    assert work.flops == drawn + 2 * 4 * 5 * 4


def test_a_window_hides_keys_in_its_own_layers_alone():
    """Prompt of 4, response of 3, in two layers that see all and two that see 3 tokens."""
    plain = dataclasses.replace(DECODER, num_layers=4)
    mixed = with_layers(plain, LayerSpec(window=3), LayerSpec())
    prompt, response = np.asarray([4]), np.asarray([[3]])
    hidden = 2 * (sum(range(1, 8)) - (1 + 2 + 3 * 5))
    fewer = flops.necessary(plain, prompt, response, "lm") - flops.necessary(mixed, prompt, response, "lm")
    assert fewer == 4 * DECODER.num_heads * DECODER.head_dim * hidden
    reads = [flops.sampling(sizes, prompt, response, 2).decode_reads for sizes in (plain, mixed)]
    # two tokens are read, of which the cache holds 5 and 6
    assert reads[0] - reads[1] == 2 * 2 * DECODER.num_kv_heads * DECODER.head_dim * 2 * (2 + 3)


SMOLLM2 = DecoderConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    max_positions=8192, tie_embeddings=True,
)  # fmt: skip
LLAMA_2_70B = dataclasses.replace(
    LLAMA_2_7B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8
)


@pytest.mark.parametrize("sizes", [SMOLLM2, LLAMA_2_7B, LLAMA_2_70B], ids=["135M", "7B", "70B"])
def test_work_of_large_models_from_a_batch_s_own_lengths(sizes):
    """Lengths of 32 bits, as batches hold them; each figure is that of unlimited integers, and no size is lost."""
    B, P, S = 512, 4096, 1024
    prompt, response = np.full(B, P, np.int32), np.full((B, 1), S, np.int32)
    params = forward.abstract_params(sizes)
    elements = sum(math.prod(x.shape) for x in jax.tree.leaves(params["layers"]) if len(x.shape) > 2)
    assert flops.layer_matrices(sizes) == elements
    read = S - 1
    matrices = elements + sizes.hidden_size * sizes.vocab_size
    slots = B * (read * P + read * (read + 1) // 2)
    reads = read * matrices + 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * slots
    work = flops.sampling(sizes, prompt, response, 2)
    assert work.decode_reads == 2 * reads
    visible = B * P * (P + 1) // 2 + slots
    attended = 4 * sizes.num_layers * sizes.num_heads * sizes.head_dim * visible
    outputs = 2 * sizes.hidden_size * (B + sizes.vocab_size * B * S)
    assert work.flops == pytest.approx(2 * elements * B * (P + read) + attended + outputs, rel=1e-12)
    passed = 2 * elements * B * (P + S) + attended
    assert flops.necessary(sizes, prompt, response, "value") == pytest.approx(passed, rel=2e-3)
    plain = flops.decode(sizes, Rows(B, P, 1, S), shards=1, bytes_each=2)
    assert reads < plain.decode_reads / 2 * 1.2 and plain.flops > 2 * elements * B * S


def test_bytes_of_a_large_model_on_each_device():
    """A 70B model has leaves of more than 2^31 elements."""
    mesh = mesh_of(1, 8, 1)
    shapes = forward.abstract_params(LLAMA_2_70B)
    assert max(math.prod(x.shape) for x in jax.tree.leaves(shapes)) > 2**34
    placed = shaped(shapes, forward.param_shardings(shapes, mesh))
    whole = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert whole / 8 <= device_bytes(placed) < whole / 8 * 1.001
    written = sum(export.nbytes for _, export in weights._exports(flatten_dict(shapes), LLAMA_2_70B, "bfloat16"))
    assert written == whole / 2


def test_an_update_by_hand():
    """One layer, D 4, one head of 2, F 3, V 5: a prompt of 3 with responses of 2 and 1, and a row that fills up."""
    sizes = dataclasses.replace(
        DECODER, vocab_size=5, hidden_size=4, intermediate_size=3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2
    )
    matrices = 4 * 2 * 4 + 3 * 4 * 3
    prompts, responses = np.asarray([3, 0], np.int32), np.asarray([[2, 1], [0, 0]], np.int32)
    # keys: 1, 2, 3 of the prompt, 4 and 5 of the first response, 4 of the second
    once = 2 * matrices * 6 + 4 * 2 * (6 + 9 + 4)
    assert flops.necessary(sizes, prompts, responses, "lm") == once + 2 * 4 * 5 * 3
    assert flops.update(sizes, prompts, responses, "lm", adapters=False) == 3 * (once + 2 * 4 * 5 * 3)
    assert flops.update(sizes, prompts, responses, "value", adapters=True) == 2 * (once + 2 * 4 * 2)


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_an_iteration_of_ppo_is_what_it_consists_of(adapters, scores):
    """On the devices as on the host, to float32; also where int32 would overflow."""
    critic = dataclasses.replace(LLAMA_2_7B, num_layers=8)
    prompts, responses = np.asarray([900, 512, 0], np.int32), np.asarray([[300], [1], [0]], np.int32)
    rows = prompts, responses
    given = {"actor_epochs": 2.0, "critic_epochs": 0.5, "adapters": adapters, "scores": scores}
    passes = 2 if adapters else 3
    policy, value = (flops.necessary(LLAMA_2_7B, *rows, "lm"), flops.necessary(critic, *rows, "value"))
    wanted = flops.sampling(LLAMA_2_7B, *rows, 2).flops + policy + (value if scores else 0)
    wanted += passes * (2 * policy + 0.5 * value)
    assert flops.ppo_iteration(LLAMA_2_7B, critic, *rows, **given) == pytest.approx(wanted, rel=1e-12)
    counted = jax.jit(lambda p, r: flops.ppo_iteration(LLAMA_2_7B, critic, p, r, **given))(*rows)
    assert counted.dtype == jnp.float32 and float(counted) == pytest.approx(wanted, rel=1e-6)
