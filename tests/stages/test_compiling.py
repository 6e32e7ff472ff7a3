"""What a stage's programs need to be compiled ahead of their first call, in threads."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import pytest

from mpo_jax.models.flops import Work
from mpo_jax.runtime.compilation import watched
from mpo_jax.runtime.sharding import replicated
from mpo_jax.stages.compiling import compile_all
from mpo_jax.stages.stage import Program
from tests.models.tiny import mesh_of


def test_a_program_in_a_thread_waits_for_what_it_is_made_from():
    """Both widths; the later calls compile nothing, and an error comes out."""
    mesh, threads, order = mesh_of(1, 1, 1), set(), []
    everywhere = replicated(mesh)

    def program(name, function, arguments):
        return Program("sft", name, "key", jax.jit(function), arguments, Work(0.0))

    def first(x):
        threads.add(threading.get_ident())
        return x * 2

    def second(x):
        order.append("second")
        return x + 3

    def then(compiled):
        order.append(next(iter(compiled["first"].output_shardings.device_set)).platform)
        return (jax.ShapeDtypeStruct((2,), jnp.float32, sharding=everywhere),)

    each = [
        [
            program("first", first, lambda _, n=n: (jax.ShapeDtypeStruct((n,), jnp.float32, sharding=everywhere),)),
            program("second", second, then),
        ]
        for n in (2, 3)
    ]
    assert len(compile_all(each, mesh, 2)) == 4
    assert threading.get_ident() not in threads and order[0] == jax.default_backend()
    with watched() as seen, jax.set_mesh(mesh):
        seen.expect({"first": ["first"], "second": ["second"]}, 4)
        for n, programs in zip((2, 3), each, strict=True):
            programs[0].function(jax.device_put(jnp.ones(n), everywhere))
    assert seen.number == 0
    broken = dataclasses.replace(each[0][0], arguments=lambda _: ())
    with pytest.raises(TypeError):
        compile_all([[broken]], mesh, 2)
