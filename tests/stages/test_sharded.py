"""A step on eight devices equals one device's; state, logits and caches are divided; checkpoints cross meshes."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax.config.schema import OptimConfig, PpoConfig, TrainConfig
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Decoder, Sampling
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.stages.ppo import compiled
from mpo_jax.stages.ppo.settings import Method
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state
from mpo_jax.types import Head, Mean, TrainState, frozen, trainable
from tests.covering import covering
from tests.models.tiny import DECODER, FAST, batch, mesh_of, random_params, trees_close

pytestmark = pytest.mark.thorough

ONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]
OBJECTIVES = ("sft", "reward_last_token", "reward_ds_span", "dpo", "ppo_actor", "ppo_critic")
# tests/training/test_update.py has the updates of these on every mesh
SEEN_ELSEWHERE = ("reward_last_token", "dpo")
CASES = [
    *(("sft", shape) for shape in MESHES),
    *covering(("ppo_actor", "ppo_critic", "reward_ds_span"), MESHES),
    *((name, MESHES[-1]) for name in SEEN_ELSEWHERE),
]

COLUMNS = 3
MODEL = Model(DECODER, logit_chunk=8 * COLUMNS)
OPTIM = OptimConfig(beta1=0.5, clip_norm=None, weight_decay=0.1, eps=1.0)
"""No clipping, so that the first moment after one step is the gradient times 1 - beta1. A small eps would make Adam's
first direction the gradient's sign, which turns rounding of small gradients into large differences."""
PPO = Method.of(PpoConfig(train=TrainConfig(batch_size=8, optim=OPTIM), critic_optim=OPTIM))
ALLOWED = jnp.arange(DECODER.vocab_size) > 1

PROMPTS = [4, 3, 6, 5, 2, 6, 4, 1]
SINGLES = batch(PROMPTS, [[9], [2], [1], [5], [8], [3], [6], [1]])
PAIRS = batch(PROMPTS, [[9, 1], [2, 2], [1, 9], [5, 4], [8, 3], [3, 8], [6, 6], [1, 1]])
SAMPLES = dataclasses.replace(SINGLES, response=np.maximum(SINGLES.response, 2))
ENDED = np.array([True, True, False, True, True, False, True, True])


@pytest.fixture(scope="module", autouse=True)
def steps_end_with_the_module() -> Iterator[None]:
    """What is kept of them below holds a quarter of the memory maps that a process may have."""
    yield
    for kept in (run_step, scored, start):
        kept.cache_clear()


def on_mesh(params: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.device_put(params, forward.param_shardings(params, mesh))


@cache
def scored(shape: tuple[int, int, int]) -> Any:
    """(PpoBatch, metrics) of the samples, on the host."""
    mesh = mesh_of(*shape)
    kinds = trainable, frozen
    policies = tuple(kind(on_mesh(random_params(DECODER, s), mesh)) for kind, s in zip(kinds, (0, 1), strict=True))
    value_models = tuple(
        kind(on_mesh(random_params(DECODER, s, head="value"), mesh)) for kind, s in zip(kinds, (5, 6), strict=True)
    )
    with jax.set_mesh(mesh):
        score = compiled.make_score(MODEL, MODEL, PPO, mesh)
        joined, ended = place_batch((SAMPLES, ENDED[:, None]), mesh)
        arguments = policies, value_models, joined, ended, ALLOWED, jnp.asarray(0.1)
        return jax.device_get(score.lower(*arguments).compile(FAST)(*arguments)[:2])


def nearby(seed: int, *, head: Head = "lm") -> Any:
    """Parameters a little away from those that made the rollout: ratios are not 1, and some are clipped."""
    there, other = (random_params(DECODER, s, head=head) for s in (seed, seed + 100))
    return jax.tree.map(lambda a, b: a + 0.03 * b, there, other)


def case(name: str, mesh: jax.sharding.Mesh, accumulation: int) -> tuple[Any, Any, tuple[Any, ...]]:
    """The stage's real jitted step, its parameters, and (batch, frozen part, *fixed arguments)."""
    if name == "sft":
        return sft.make_step(MODEL, OPTIM, accumulation, mesh), random_params(DECODER), (SINGLES, {})
    if name == "dpo":
        ref = np.random.default_rng(0).normal(-10, 3, (8, 2)).astype(np.float32)
        step = dpo.make_step(MODEL, OPTIM, PreferenceLoss(name="dpo", beta=0.1), 0.3, accumulation, mesh)
        return step, random_params(DECODER), (dpo.DpoBatch(PAIRS, ref), {})
    if name.startswith("reward"):
        step = reward.make_step(MODEL, OPTIM, name.removeprefix("reward_"), accumulation, mesh)
        return step, random_params(DECODER, head="value"), (PAIRS, {})
    rollouts, _ = scored(ONE)
    method = PPO.model_copy(update={"accumulation": accumulation})
    actor, critic = compiled.make_updates(MODEL, MODEL, method, mesh)
    if name == "ppo_actor":
        return actor, nearby(0), ((rollouts, None), {}, ALLOWED)
    return critic, nearby(5, head="value"), (rollouts, {})


@dataclasses.dataclass
class Step:
    """One update: the state it was given and the one it returned, its metrics, and its compiled program."""

    before: TrainState
    state: TrainState
    metrics: dict[str, Any]
    compiled: Any

    @property
    def gradients(self) -> Any:
        return jax.tree.map(lambda x: x / (1 - OPTIM.beta1), optax.tree_utils.tree_get(self.state.opt_state, "mu"))


def metrics_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Means by value, since a total may be a small difference of large terms; their counts exactly."""

    def shown(metrics):
        return {key: m.value if isinstance(m, Mean) else m for key, m in metrics.items()}

    assert found.keys() == wanted.keys()
    for key, mean in wanted.items():
        assert not isinstance(mean, Mean) or found[key].count == mean.count, key
    check = lambda path, a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=str(path))  # noqa: E731
    jax.tree_util.tree_map_with_path(check, shown(found), shown(wanted))


@cache
def start(shape: tuple[int, int, int], head: Head) -> tuple[TrainState, Any]:
    """A state at step 0 on the host, and the shardings that init_state gave it."""
    state = init_state(trainable(random_params(DECODER, head=head)), make_optimizer(OPTIM), mesh_of(*shape))
    return jax.device_get(state), jax.tree.map(lambda x: x.sharding, state)


@cache
def run_step(name: str, shape: tuple[int, int, int], accumulation: int = 1) -> Step:
    """One update of a stage on a mesh; compiled once for all tests."""
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        update, params, (data, *fixed) = case(name, mesh, accumulation)
        state, shardings = start(shape, "value" if "score" in params else "lm")
        before = jax.device_put(dataclasses.replace(state, trainable=params), shardings, may_alias=False)
        before = with_learning_rate(before, 0.1)
        arguments = (before, place_batch(data, mesh), *fixed)
        program = update.lower(*arguments).compile(FAST)
        state, metrics = program(*arguments)
    return Step(before, state, jax.device_get(metrics), program)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_loss_metrics_gradients_and_parameters_equal_one_devices(name, shape):
    one, many = run_step(name, ONE), run_step(name, shape)
    assert many.state.trainable["embedding"].sharding.num_devices == 8
    trees_close(many.gradients, one.gradients, rtol=0, atol=1e-5)
    trees_close(many.state.trainable, one.state.trainable, rtol=0, atol=1e-5)
    metrics_close(many.metrics, one.metrics)


def test_the_cases_are_worth_comparing():
    """Every gradient is there, both sides of PPO's clips are visited, and the two reward losses differ."""
    for name in OBJECTIVES:
        assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(jax.device_get(run_step(name, ONE).gradients)))
    for name, key in (("ppo_actor", "policy/clipfrac_avg"), ("ppo_critic", "val/clipfrac_avg")):
        assert 0.1 < run_step(name, ONE).metrics[key].value < 0.9
    last, span = (run_step(f"reward_{loss}", ONE).metrics["loss"].value for loss in ("last_token", "ds_span"))
    assert abs(last - span) > 1e-3


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_new_state_lies_like_its_parameters_and_the_old_one_is_donated(name, shape):
    done, mesh = run_step(name, shape), mesh_of(*shape)
    wanted = forward.param_shardings(done.state.trainable, mesh)
    adam = done.state.opt_state
    for tree in (done.state.trainable, *(optax.tree_utils.tree_get(adam, moment) for moment in ("mu", "nu"))):
        assert jax.tree.structure(tree) == jax.tree.structure(wanted)
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            assert leaf.addressable_shards[0].data.shape == sharding.shard_shape(leaf.shape)
    numbers = [leaf for leaf in jax.tree.leaves(done.state) if leaf.ndim == 0]
    # the state's three counters, the learning rate, and the updates that Adam and the injected rate have counted
    assert len(numbers) == 6 and all(leaf.sharding.is_fully_replicated for leaf in numbers)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(done.before))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(done.state))
    assert done.compiled.memory_analysis().alias_size_in_bytes >= held


def test_scoring_of_rollouts_equals_one_devices():
    """Log-probabilities, values, scores, advantages and returns, and what is reported of them."""
    (one, one_metrics), (many, many_metrics) = scored(ONE), scored((2, 2, 2))
    trees_close(many, one, rtol=0, atol=1e-5)
    metrics_close(many_metrics, one_metrics)


# ---- activations ---------------------------------------------------------------------------------------------------


def buffers(compiled: Any) -> set[tuple[int, ...]]:
    """The shapes of all float arrays in a compiled program, each a device's own part."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())}


@pytest.mark.parametrize(("name", "shape"), covering(("ppo_actor", "sft"), MESHES))
def test_logits_are_divided_over_batch_and_vocabulary(name, shape):
    """In the real training step, forward and backward: a chunk's logits exist in parts alone."""
    data, fsdp, tensor = shape
    V, rows = DECODER.vocab_size, 8 // (data * fsdp)
    found = buffers(run_step(name, shape).compiled)
    chunk = lambda rows, ids: {(rows, COLUMNS, ids), (rows * COLUMNS, ids)}  # noqa: E731
    assert chunk(rows, V // tensor) & found
    for more in (2, 4, 8):
        gathered = chunk(more * rows, V // tensor) & found
        assert not gathered or more * rows > 8, "logits of other devices' rows"
    if tensor > 1:
        assert not any(V in dims for dims in found), "neither logits nor the head are whole along the vocabulary"
    assert chunk(8, V) & buffers(run_step(name, ONE).compiled), "the measure sees whole logits"


@pytest.mark.parametrize("shape", MESHES)
def test_the_cache_is_divided_over_batch_and_kv_heads(shape):
    """After prefill, after decoding, and nowhere whole in between: two programs, as in make_generate."""
    data, fsdp, tensor = shape
    mesh, N, S = mesh_of(*shape), 2, 10
    decoder = Decoder(MODEL, Sampling(S, num_samples=N), 0)

    def decode(params, state):
        return decoder.advance(forward.for_decoding(MODEL, params["trainable"]), state, None)

    with jax.set_mesh(mesh):
        params, prompts = trainable(on_mesh(random_params(DECODER), mesh)), place_batch(SINGLES, mesh)
        visit = jnp.zeros_like(prompts.key)
        first = jax.jit(decoder.begin).lower(params, prompts, jax.random.key(0), visit, None).compile(FAST)
        state = first(params, prompts, jax.random.key(0), visit, None)
        then = jax.jit(decode).lower(params, state).compile(FAST)
    B, G, K = 8 * N, DECODER.num_kv_heads, DECODER.head_dim
    rows, heads = B // (data * fsdp), G // tensor
    widths = max(PROMPTS) + decoder.room, decoder.chunk
    assert {x.shape for x in jax.tree.leaves(state.caches)} == {(B, G, widths[0], K)}
    for program in (first, then):
        for sharding in jax.tree.leaves(program.output_shardings.caches):
            assert sharding.shard_shape((B, G, widths[0], K)) == (rows, heads, widths[0], K)
    assert {(rows, heads, T, K) for T in widths} <= buffers(then)
    wider = {(b, g) for b in (rows, B) for g in (heads, G)} - {(rows, heads)}
    assert not {(b, g, T, K) for b, g in wider for T in widths} & (buffers(first) | buffers(then))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def described(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@pytest.mark.parametrize("saved", [ONE, *MESHES])
def test_a_checkpoint_of_one_mesh_is_bit_identical_on_every_other(saved, tmp_path):
    """Parameters, moments and counters of a state after an update, each where the other mesh wants it."""
    state = run_step("sft", saved).state
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state)
    checkpoints.close()
    for shape in {ONE, *MESHES} - {saved}:
        target = jax.tree.map(described, run_step("sft", shape).state)
        checkpoints = Checkpoints(tmp_path, keep=1)
        number, found = checkpoints.restore(target)
        checkpoints.close()
        assert number == 1 and jax.tree.structure(found) == jax.tree.structure(state)
        for leaf, wanted, there in zip(*map(jax.tree.leaves, (found, state, target)), strict=True):
            assert leaf.dtype == wanted.dtype and leaf.sharding.is_equivalent_to(there.sharding, leaf.ndim)
            assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()
