"""mpo_jax.runtime.offload: what rests in host memory comes back to the bit, and a run with it is the run without it."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax.config.schema import OptimConfig, RuntimeConfig
from mpo_jax.errors import UserError
from mpo_jax.runtime import machine, offload
from mpo_jax.runtime.offload import HOST, Offload, to_devices, to_host
from mpo_jax.runtime.sharding import device_bytes
from mpo_jax.stages.ppo.iteration import Loop
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import init_state
from mpo_jax.types import trainable
from tests.models.tiny import DECODER, mesh_of, random_params
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.thorough

ON = ("runtime.offload_frozen=true", "runtime.offload_moments=true")


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_there_and_back_is_the_same_array(shape):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        state = init_state(trainable(random_params(DECODER)), make_optimizer(OptimConfig()), mesh)
    resting = to_host(state)
    back = to_devices(resting)
    assert kinds(state) == kinds(back) == {"device"} and kinds(resting) == {HOST}
    for a, b, c in zip(*map(jax.tree.leaves, (state, resting, back)), strict=True):
        assert a.sharding == c.sharding and b.sharding.spec == a.sharding.spec and b.sharding.mesh == a.sharding.mesh
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes() == np.asarray(c).tobytes()
    assert all(a is b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(to_devices(state)), strict=True))


def test_a_donated_copy_leaves_the_resting_array_alone():
    """Where host and device are one a copy might be the same memory."""
    resting = to_host(jnp.arange(4096.0))
    jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(to_devices(resting)))
    np.testing.assert_array_equal(np.asarray(resting), np.arange(4096.0))


def test_moments_rest_between_updates_alone():
    seen = []

    def update(state, rate):
        seen.append(kinds(state))
        return state, rate

    mesh = mesh_of(1, 1, 1)
    state = init_state(trainable(random_params(DECODER)), make_optimizer(OptimConfig()), mesh)
    for moments in (False, True):
        offload = Offload.of(RuntimeConfig(offload_moments=moments), mesh)
        resting = offload.state(state)
        after, rate = offload.update(update)(resting, 0.5)
        assert kinds(resting.opt_state) == kinds(after.opt_state) == {HOST if moments else "device"}
        assert kinds(after.trainable) == {"device"} == seen.pop() and rate == 0.5
        assert kinds(offload.frozen_params(state.trainable)) == {"device"}


def test_devices_without_such_memory_are_an_error(monkeypatch):
    monkeypatch.setattr("mpo_jax.runtime.offload.HOST", "attic")
    message = "runtime.offload_moments=true needs memory of the kind attic, but .* has .*unpinned_host.* alone: set"
    with pytest.raises(UserError, match=message):
        Offload.of(RuntimeConfig(offload_moments=True), mesh_of(1, 1, 1))
    Offload.of(RuntimeConfig(), mesh_of(1, 1, 1))


def test_pinned_memory_is_counted_from_shapes():
    """By hand: a [16 8] float32 array in 4 parts and one that is whole on 4 devices, frozen once and moments twice."""
    mesh = mesh_of(1, 4, 1)

    def shape(*dims, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    divided, whole = shape(16, 8, spec=("fsdp",)), shape(8, spec=(), dtype=jnp.bfloat16)
    bytes_each = 16 * 8 * 4 // 4 + 8 * 2
    assert device_bytes({"a": divided, "b": [whole]}) == bytes_each
    for frozen, moments, times in [(True, True, 3), (True, False, 1), (False, True, 2), (False, False, 0)]:
        needed = Offload(frozen, moments).pinned_bytes(frozen=[divided, whole], moments=[divided, whole], num_devices=4)
        assert needed == 4 * times * bytes_each


GPU_HOST = 512 * offload.GIB


@pytest.mark.parametrize(
    ("keys", "platform", "memory", "given", "limit"),
    [
        (("offload_moments",), "gpu", GPU_HOST, {}, "512"),
        (("offload_frozen",), "gpu", GPU_HOST + 1, {}, "512"),
        ((), "gpu", GPU_HOST, {}, None),
        (("offload_moments",), "tpu", GPU_HOST, {}, None),
        # the user's own limit stays, and so does XLA's where the host has no more
        (("offload_moments",), "gpu", GPU_HOST, {offload.POOL_LIMIT: "100"}, "100"),
        (("offload_moments",), "gpu", 32 * offload.GIB, {}, None),
        # this one takes the whole pool at once
        (("offload_moments",), "gpu", GPU_HOST, {"XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE": "true"}, None),
    ],
)
def test_xla_s_pool_may_grow_to_the_host_s_memory(keys, platform, memory, given, limit):
    environment = dict(given)
    runtime = RuntimeConfig(**dict.fromkeys(keys, True))
    widened = offload.widen_pool(runtime, platform, memory, environment)
    assert environment.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB") == limit
    assert widened == (int(limit) if limit is not None and not given else None)


def test_it_is_widened_before_jax_starts_and_said(monkeypatch, capsys):
    monkeypatch.setattr(machine.flags, "detect", lambda environment: "gpu")
    monkeypatch.setattr(machine, "host_memory", lambda: GPU_HOST)
    # set and then removed, so that the test leaves no trace
    monkeypatch.setenv(offload.POOL_LIMIT, "1")
    monkeypatch.delenv(offload.POOL_LIMIT)
    monkeypatch.setattr(machine.processes, "join", lambda _: seen.append(os.environ[offload.POOL_LIMIT]))
    seen: list[str] = []
    machine.start(RuntimeConfig(offload_moments=True, compilation_cache=None))
    assert seen == ["512"] and f"{offload.POOL_LIMIT}=512" in capsys.readouterr().out
    os.environ.pop(offload.POOL_LIMIT)


@pytest.mark.parametrize(
    ("gib", "platform", "given", "message"),
    [
        (300, "gpu", {offload.POOL_LIMIT: "512"}, None),
        (300, "cpu", {}, None),
        (600, "cpu", {}, "600.0 GiB of host memory are needed, but this host has 512.0 GiB"),
        (600, "gpu", {offload.POOL_LIMIT: "1024"}, "but this host has 512.0 GiB"),
        (300, "gpu", {}, "but XLA pins at most 64 GiB: unset XLA_PJRT_.*or set it to 300 or more"),
        (300, "gpu", {offload.POOL_LIMIT: "100"}, "but XLA pins at most 100 GiB"),
    ],
)
def test_too_little_memory_is_an_error(gib, platform, given, message):
    check = lambda: offload.check_pinned(gib * offload.GIB, GPU_HOST, platform, given)  # noqa: E731
    if message is None:
        check()
    else:
        with pytest.raises(UserError, match=message):
            check()


def test_a_container_s_limit_counts_as_the_host_s_memory(tmp_path, monkeypatch):
    physical = machine.host_memory()
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", (str(tmp_path / "v2"), str(tmp_path / "v1")))
    assert machine.host_memory() >= physical
    for text, expected in [("max\n", None), ("1073741824\n", offload.GIB), ("9223372036854771712\n", None)]:
        (tmp_path / "v2").write_text(text)
        assert machine.host_memory() == expected or (expected is None and machine.host_memory() >= physical)


@pytest.fixture(scope="module", params=[(1, False), (1, True), (8, False)], ids=["1", "1 one pass", "8"])
def plain(request, tmp_path_factory):
    """A workdir with PPO, and the settings that it was made with."""
    workdir, (devices, one_pass) = tmp_path_factory.mktemp("plain"), request.param
    settings = (
        f"mesh.fsdp={devices}", f"runtime.cpu_devices={devices}", f"ppo.one_pass={str(one_pass).lower()}",
        "ppo.kl.adaptive=true",
    )  # fmt: skip
    if not one_pass:
        settings += ("ppo.score=normalised", "ppo.epochs=2", f"ppo.minibatches={2 if devices == 1 else 1}")
    assert mpo("ppo", MICRO, f"workdir={workdir}", *settings) == 0
    return workdir, settings


def test_ppo_is_the_same_to_the_bit_and_goes_on_with_and_without(plain, tmp_path, monkeypatch):
    """Ended once with all of it at rest and once without, it goes on the other way."""
    whole, settings = plain
    (folder,) = whole.glob("stages/ppo-*")
    workdir = tmp_path / "again"
    shutil.copytree(whole, workdir, symlinks=True)
    shutil.rmtree(workdir / "stages" / folder.name)
    iteration, seen = Loop.iteration, []

    def watched(self, state, batch, *rest):
        if batch.number == stop:
            raise KeyboardInterrupt
        moments = kinds((state.actor.opt_state, state.critic.opt_state))
        state, metrics, kept = iteration(self, state, batch, *rest)
        later = kinds((state.actor.opt_state, state.critic.opt_state))
        seen.append((batch.number, moments | later, kinds((self.models.reference, self.models.reward))))
        assert kinds((state.actor.trainable, state.critic.trainable, kept)) == {"device"}
        return state, metrics, kept

    monkeypatch.setattr(Loop, "iteration", watched)
    command = ("ppo", MICRO, f"workdir={workdir}", *settings, "ppo.train.checkpoint_every=1")
    stop = 1
    assert mpo(*command, *ON) == 130
    stop = 2
    assert mpo(*command) == 130
    stop = 3
    assert mpo(*command, *ON) == 0
    assert seen == [(0, {HOST}, {HOST}), (1, {"device"}, {"device"}), (2, {HOST}, {HOST})]
    again = workdir / "stages" / folder.name
    for model in ("model", "critic"):
        files = [at / model / "model.safetensors" for at in (folder, again)]
        assert files[0].read_bytes() == files[1].read_bytes()
    last = [json.loads((at / "metrics.jsonl").read_text().splitlines()[-1]) for at in (folder, again)]
    numbers = [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf"))} for line in last]
    assert numbers[0] == numbers[1] and "state_hash" in numbers[0]
