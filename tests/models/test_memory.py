"""What the compiled log-probabilities hold at one time: the logits of a chunk, never those of the batch."""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.types import Tokens
from tests.covering import the_rest_thorough
from tests.models.tiny import DECODER

pytestmark = pytest.mark.optimised

B, T, V, D = 4, 512, 8192, 16
CHUNKS = (B * 8, B * 32)
WHOLE = B * T
ROW = V * 4
"""Bytes of one token's float32 logits. The batch's are 64 MiB, where all other activations are 16."""

CONFIG = dataclasses.replace(
    DECODER, vocab_size=V, hidden_size=D, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1
)


@pytest.fixture(scope="module", params=the_rest_thorough([False, True]), ids=["forward", "backward"])
def program(request) -> Callable[[int], Any]:
    """Tokens a chunk -> the compiled program of a batch whose every token is scored."""

    @cache
    def compiled(chunk: int) -> Any:
        def total(params, tokens):
            logp, entropy = forward.token_logp(Model(CONFIG, logit_chunk=chunk), params, tokens, with_entropy=True)
            return logp.sum() + entropy.sum()

        ints = jnp.ones((B, T), jnp.int32)
        tokens = Tokens(ints, ints, ints, ints, ints > 0)
        function = jax.value_and_grad(total) if request.param else total
        return jax.jit(function).lower(forward.abstract_params(CONFIG), tokens).compile()

    return compiled


def most_logits(program: Any) -> int:
    """Tokens of the largest array along the vocabulary in a program's text, the head and the embedding apart."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b\w+\[([\d,]+)\]", program.as_text())}
    return max(math.prod(shape) // V for shape in shapes - {(V, D), (D, V)} if V in shape)


def scratch(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_no_array_holds_the_logits_of_more_than_a_chunk(program):
    for chunk in (*CHUNKS, WHOLE):
        assert most_logits(program(chunk)) == chunk


def test_scratch_memory_grows_with_the_chunk_and_not_with_the_batch(program):
    """A few times the chunk's logits; 2,048 tokens at once take at least theirs, so the measure sees logits."""
    assert scratch(program(CHUNKS[0])) < WHOLE * ROW / 3
    assert scratch(program(WHOLE)) > 2 * WHOLE * ROW
    for small, large in pairwise((*CHUNKS, WHOLE)):
        growth = scratch(program(large)) - scratch(program(small))
        assert (large - small) * ROW <= growth <= 5 * (large - small) * ROW
