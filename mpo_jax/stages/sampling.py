"""The programs of sampling: whole batches, as in PPO, and refilled rows, as in selection and evaluation."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mpo_jax.data.lengths import Lengths
from mpo_jax.models import flops
from mpo_jax.models.flops import Rows, Work
from mpo_jax.models.generate import Decoder, Sampling, make_for_decoding, make_generate
from mpo_jax.runtime.sharding import batch_sharding, replicated
from mpo_jax.stages.shapes import Shapes, shaped
from mpo_jax.stages.stage import Program
from mpo_jax.training import refill
from mpo_jax.types import Params

ANY_EOS = 0
"""A placeholder: the EOS id affects neither memory nor work."""


def rollout_programs(
    stage: str,
    shapes: Shapes,
    sampling: Sampling,
    params: Params,
    size: int,
    *,
    key: str,
    runs: float | None,
    held: tuple[Any, ...] = (),
    lengths: Lengths | None = None,
) -> Iterator[Program]:
    """Prefill and decode of one batch; decode takes the caches in the layout of the compiled prefill."""
    eos_id = ANY_EOS if shapes.eos_id is None else shapes.eos_id
    generate = make_generate(shapes.model, sampling, eos_id, shapes.mesh)
    rows, decoder = shapes.rows(size, sampling.num_samples), Decoder(shapes.model, sampling, eos_id)
    prompts = shapes.prompts(rows)
    start = (params, prompts, shapes.key(), shapes.array(size, dtype=jnp.uint32), shapes.allowed())
    program = partial(Program, stage, batch_key=key, runs=runs)
    yield program(
        name=f"{stage} prefill", function=generate.begin, arguments=lambda _: start, held=held,
        work=flops.prefill(shapes.model.decoder, rows),
        expected=shapes.mean(lengths, rows, partial(flops.prefill, shapes.model.decoder)),
    )  # fmt: skip
    yield program(
        name=f"{stage} weights", function=generate.for_decoding, arguments=lambda _: (params,), held=held,
        work=Work(0.0),
    )  # fmt: skip

    def then(compiled: Mapping[str, Any]) -> tuple[Any, ...]:
        state = _made(shapes, compiled, f"{stage} prefill", generate.begin, start)
        ready = _made(shapes, compiled, f"{stage} weights", generate.for_decoding, (params,))
        return ready, dataclasses.replace(state, caches=()), state.caches, prompts, shapes.allowed()

    yield program(
        name=f"{stage} decode", function=generate.finish, arguments=then,
        # the parameters stay in memory beside the decoding weights made from them
        held=(params, *held), work=shapes.decoding(rows),
        loop_trips=(-(-decoder.room // decoder.chunk), _trips(decoder)),
        expected=shapes.mean(lengths, rows, shapes.decoding),
    )  # fmt: skip


def refill_programs(
    stage: str,
    shapes: Shapes,
    sampling: Sampling,
    params: Params,
    size: int,
    *,
    num_prompts: int | None,
    held: tuple[Any, ...] = (),
    lengths: Lengths | None = None,
) -> Iterator[Program]:
    """Prefill of a portion of prompts into finished rows, and decode of a chunk of tokens for all rows."""
    start, insert, advance = refill.programs(shapes.model, sampling, ANY_EOS, shapes.mesh)
    decoder, for_decoding = Decoder(shapes.model, sampling, ANY_EOS), make_for_decoding(shapes.model)
    rows = shapes.rows(size, sampling.num_samples)
    part = dataclasses.replace(rows, count=refill.portion(size, shapes.shards))
    prompts, num_rows = shapes.prompts(part), size * sampling.num_samples
    blank = jax.eval_shape(partial(start, num_rows=num_rows), params, prompts, shapes.key(), shapes.allowed())
    state = shaped(blank, jax.tree.map(lambda s, _: s, decoder.shardings(shapes.mesh), blank))
    places = jax.ShapeDtypeStruct((part.count * sampling.num_samples,), jnp.int32, sharding=replicated(shapes.mesh))
    program = partial(Program, stage, batch_key=f"{stage}.batch_size")
    a_chunk = decoder.chunk / sampling.max_new_tokens

    def chunk_of(rows: Rows) -> Work:
        return shapes.decoding(dataclasses.replace(rows, response=sampling.max_new_tokens)).times(a_chunk)

    # a row that has ended makes room for the next prompt, so the mean length counts, not the longest
    shorter = 1.0 if lengths is None else float(lengths.response.mean()) / sampling.max_new_tokens
    portions = None if num_prompts is None else num_prompts / part.count
    # rows are refilled, so all rows keep sampling until the prompts run out
    chunks = None if num_prompts is None else num_prompts / size * sampling.max_new_tokens / decoder.chunk
    yield program(
        name=f"{stage} weights", function=for_decoding, arguments=lambda _: (params,), held=held, work=Work(0.0),
        runs=None if num_prompts is None else 1.0,
    )  # fmt: skip

    def then(compiled: Mapping[str, Any]) -> tuple[Any, ...]:
        ready = _made(shapes, compiled, f"{stage} weights", for_decoding, (params,))
        return ready, state, shapes.allowed()

    yield program(
        name=f"{stage} prefill", function=insert,
        arguments=lambda _: (params, state, prompts, places, shapes.key(), shapes.allowed()),
        held=held, keeps=(f"{stage} weights",), work=flops.prefill(shapes.model.decoder, part), runs=portions,
        expected=shapes.mean(lengths, part, partial(flops.prefill, shapes.model.decoder)),
    )  # fmt: skip
    yield program(
        name=f"{stage} decode", function=advance,
        arguments=then, held=(params, *held), loop_trips=_trips(decoder), runs=chunks,
        work=shapes.decoding(rows).times(a_chunk),
        expected=shapes.mean(lengths, rows, lambda rows: chunk_of(rows).times(shorter)),
    )  # fmt: skip


def _trips(decoder: Decoder) -> int:
    """The mean number of tokens that each of a chunk's loops draws: there is one for each part, of which one runs."""
    return -(-decoder.chunk // len(decoder.parts))


def _made(shapes: Shapes, compiled: Mapping[str, Any], name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Shapes of a program's results, with the shardings of its compiled version if there is one."""
    found = jax.eval_shape(function, *arguments)
    return shaped(found, compiled[name].output_shardings if name in compiled else batch_sharding(shapes.mesh))
