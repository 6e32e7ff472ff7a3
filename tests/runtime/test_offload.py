"""mpo_jax.runtime.offload: what rests in host memory comes back to the bit, and a run with it is the run without it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.schema import OptimConfig, RuntimeConfig
from mpo_jax.errors import UserError
from mpo_jax.runtime.offload import HOST, Offload, to_devices, to_host
from mpo_jax.stages.ppo.iteration import Loop
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import init_state
from mpo_jax.types import trainable
from tests.models.tiny import DECODER, mesh_of, random_params
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.unoptimised

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
        assert kinds(offload.rested(state.trainable)) == {"device"}


def test_devices_without_such_memory_are_an_error(monkeypatch):
    monkeypatch.setattr("mpo_jax.runtime.offload.HOST", "attic")
    message = "runtime.offload_moments=true needs memory of the kind attic, but .* has .*unpinned_host.* alone: set"
    with pytest.raises(UserError, match=message):
        Offload.of(RuntimeConfig(offload_moments=True), mesh_of(1, 1, 1))
    Offload.of(RuntimeConfig(), mesh_of(1, 1, 1))


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
