"""The update is exact whatever the portions, and the host loop resumes where it was."""

import json
import signal
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config, OptimConfig, RuntimeConfig, TrainConfig
from mpo_jax.errors import Preempted, UserError
from mpo_jax.models.forward import Model
from mpo_jax.runtime.preemption import stopping_at
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.runtime.stage_warnings import collect_warnings
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.training.checkpoints import leaf_hashes, state_hash
from mpo_jax.training.loop import fit, init_state, make_update, state_sharding
from mpo_jax.types import Mean
from tests.models.tiny import DECODER, FAST, batch, mesh_of, random_params, trees_close

pytestmark = pytest.mark.unoptimised

MODEL = Model(DECODER)
LENGTHS = [[9, 1], [2, 2], [1, 9], [5, 4], [8, 3], [3, 8], [6, 6], [1, 1]]
"""Uneven on purpose: a mean of micro-batch means would weigh tokens wrongly."""


def cases():
    one = batch([4, 3, 6, 5, 2, 6, 4, 1], [[a] for a, _ in LENGTHS])
    two = batch([4, 3, 6, 5, 2, 6, 4, 1], LENGTHS)
    ref = np.random.default_rng(0).normal(-10, 3, (8, 2)).astype(np.float32)
    loss = dpo.DpoLoss("dpo", 0.1, 0.0, False, 0.3)
    return {
        "sft": (partial(sft.objective, MODEL), random_params(DECODER), one),
        "reward": (partial(reward.objective, MODEL, "last_token"), random_params(DECODER, head="value"), two),
        "reward_ds_span": (partial(reward.objective, MODEL, "ds_span"), random_params(DECODER, head="value"), two),
        "dpo_with_nll": (partial(dpo.objective, MODEL, loss), random_params(DECODER), (two, ref)),
    }


@pytest.mark.parametrize("name", cases())
def test_accumulation_equals_the_whole_batch(name):
    objective, params, data = cases()[name]
    data = jax.tree.map(jnp.asarray, data)
    optim = OptimConfig(clip_norm=None, beta1=0.0)  # the first moment is the gradient

    state = init_state(params, optim, mesh_of(1, 1, 1))

    def run(accumulation):
        update = jax.jit(make_update(objective, optim, accumulation=accumulation))
        arguments = state, data, jnp.asarray(0.1)
        after, metrics = update.lower(*arguments).compile(FAST)(*arguments)
        assert metrics.pop("skipped").count == 0
        return optax.tree_utils.tree_get(after.opt_state, "mu"), metrics.pop("grad_norm"), metrics

    whole_grads, whole_norm, whole_metrics = run(1)
    for accumulation in (2, 4, 8):
        grads, norm, metrics = run(accumulation)
        trees_close(grads, whole_grads, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(norm, whole_norm, rtol=1e-5)
        for key, value in whole_metrics.items():
            if isinstance(value, Mean):
                np.testing.assert_allclose(metrics[key].total, value.total, rtol=1e-5, atol=1e-5)
                assert metrics[key].count == value.count
            else:
                assert metrics[key] == value


def test_uneven_masks_would_tell_a_mean_of_means_apart():
    """Guards the test above: the micro-batches' own means do differ from the whole batch's."""
    objective, params, data = cases()["sft"]
    whole = objective(params, data)[0]["loss"].value
    halves = [objective(params, jax.tree.map(lambda x, s=s: x[s::2], data))[0]["loss"].value for s in (0, 1)]
    assert abs(np.mean(halves) - whole) > 1e-3


@cache
def updated(name: str, shape: tuple[int, int, int]) -> tuple[Any, float]:
    """Parameters after one update on a mesh, and the gradient's norm; the state lies where state_sharding says."""
    objective, params, data = cases()[name]
    mesh = mesh_of(*shape)
    # eps large against rounding: Adam's first step is sign(g), which amplifies the rounding of tiny gradients
    optim = OptimConfig(learning_rate=0.1, eps=1e-2, weight_decay=0.1)
    with jax.set_mesh(mesh):
        shardings = state_sharding(MODEL, optim, mesh, head="value" if name == "reward" else "lm")
        state = init_state(jax.device_put(params, shardings.params), optim, mesh)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state.opt_state, shardings.opt_state))
        step = jax.jit(make_update(objective, optim, accumulation=1), out_shardings=(shardings, None))
        arguments = state, place_batch(data, mesh), jnp.asarray(0.1)
        state, metrics = step.lower(*arguments).compile(FAST)(*arguments)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    sharded = [x for x in moments if not x.sharding.is_fully_replicated]
    assert bool(sharded) == (shape not in ((1, 1, 1), (8, 1, 1)))
    return jax.device_get(state.params), float(metrics["grad_norm"])


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo_with_nll"])
def test_update_on_a_mesh_equals_one_device(shape, name):
    """Updated parameters and moments agree to rounding, and the optimiser's state lies like its parameters."""
    (one, one_norm), (many, many_norm) = updated(name, (1, 1, 1)), updated(name, shape)
    trees_close(many, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(many_norm, one_norm, rtol=1e-5)


def run_fit(folder, *, steps=7, broken=(), die_at=None, at=None, carry_on=False, config=None, **train):
    """SFT steps through `fit`; batches `broken` give no finite number, and `at(k)` is called in step k.

    `carry_on`: without the guard, as a reference for what a run without the broken batches gives.
    """
    objective, params, data = cases()["sft"]
    mesh, optim = mesh_of(1, 1, 1), OptimConfig(learning_rate=0.01)
    config = config or Config(runtime=RuntimeConfig(tensorboard=False))
    train = TrainConfig(steps=steps, batch_size=8, optim=optim, **{"log_every": 1, "checkpoint_every": 2, **train})

    def poisoned(params, batch):
        rows, poison_B = batch
        terms, metrics = objective(params, rows)
        loss = terms["loss"]
        return {"loss": Mean(loss.total * poison_B[0], loss.count)}, metrics

    with jax.set_mesh(mesh):
        update = jax.jit(make_update(poisoned, optim, accumulation=1), donate_argnums=0)

        def step(state, k):
            if k == die_at:
                raise RuntimeError("killed")
            if at is not None:
                at(k)
            rolled = jax.tree.map(lambda x: np.roll(x, k, 0), data)
            if k in broken and carry_on:
                return state, {}, None
            batch = (rolled, np.full(8, np.nan if k in broken else 1.0, np.float32))
            return *update(state, batch, jnp.asarray(0.01 * (k + 1))), {"rows": rolled}

        start = init_state(params, optim, mesh)
        return fit(start, step, config=config, train=train, num_steps=steps, folder=folder, stage="sft")


def logged(folder) -> list[dict]:
    """The lines of the log, without what no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))} for row in rows]


def test_fit_resumes_and_ends_equal_to_an_uninterrupted_run(tmp_path):
    """Killed between two checkpoints: the same call again ends bit-identical, and the log is the same."""
    whole, last = run_fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run_fit(tmp_path / "killed", die_at=5)
    resumed, resumed_last = run_fit(tmp_path / "killed")
    assert int(resumed.step) == 7
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(resumed))
    assert last["train"]["loss"] == resumed_last["train"]["loss"]
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    hashes = [row.get("state_hash") for row in logged(tmp_path / "whole")]
    assert [bool(digest) for digest in hashes] == [False, True, False, True, False, True, True]
    assert hashes[-1] == state_hash(leaf_hashes(whole))


def test_steps_with_a_checkpoint_are_logged(tmp_path):
    """Else a run that goes on from one would average over other steps than an uninterrupted run."""
    run_fit(tmp_path / "whole", log_every=5, checkpoint_every=3)
    assert [row["step"] for row in logged(tmp_path / "whole")] == [1, 3, 5, 6, 7]
    with pytest.raises(RuntimeError, match="killed"):
        run_fit(tmp_path / "killed", log_every=5, checkpoint_every=3, die_at=6)
    run_fit(tmp_path / "killed", log_every=5, checkpoint_every=3)
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


def test_skipped_updates_are_warned_of_and_a_model_without_any_is_no_result(tmp_path):
    with collect_warnings() as warnings:
        run_fit(tmp_path / "some", steps=4, broken=(2,))
    assert warnings == ["sft skipped 1 of 4 steps' updates: their loss or gradient was not finite"]
    with pytest.raises(UserError, match="sft: the loss or the gradient was not finite in any of its 3 updates"):
        run_fit(tmp_path / "none", steps=3, broken=(0, 1, 2))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_an_update_that_is_not_finite_changes_nothing(what, accumulation):
    """Not the parameters, moments or counts; and the next update is as if the bad one had never been."""
    objective, params, data = cases()["sft"]
    optim = OptimConfig(learning_rate=0.01)

    def poisoned(params, batch):
        rows, poison_B = batch
        terms, metrics = objective(params, rows)
        loss = terms["loss"]
        # an infinite loss whose gradient is the usual one
        total = loss.total * poison_B[0] if what == "gradient" else loss.total + jax.lax.stop_gradient(poison_B[0] - 1)
        return {"loss": Mean(total, loss.count)}, metrics

    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        step = jax.jit(make_update(poisoned, optim, accumulation=accumulation))
        one = lambda state, value: step(state, (data, np.full(8, value, np.float32)), jnp.asarray(0.01))  # noqa: E731
        first, metrics = one(init_state(params, optim, mesh), 1.0)
        assert (int(metrics["skipped"].count), int(metrics["skipped"].in_a_row)) == (0, 0)
        state = first
        for number, value in enumerate((np.nan, np.inf) if what == "gradient" else (np.inf, np.nan), 1):
            state, metrics = one(state, value)
            assert (int(metrics["skipped"].count), int(metrics["skipped"].in_a_row)) == (1, number)
            assert metrics["loss"].count == 0 == metrics["loss"].total
        chex.assert_trees_all_equal(
            (first.step, first.params, first.opt_state), (state.step, state.params, state.opt_state)
        )
        assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 2)
        (after, metrics), (expected, _) = one(state, 1.0), one(first, 1.0)
    chex.assert_trees_all_equal(after.params, expected.params)
    chex.assert_trees_all_equal(after.opt_state, expected.opt_state)
    assert (int(after.skipped), int(after.skipped_in_a_row), int(after.step)) == (2, 0, 2)
    assert metrics["loss"].count > 0


def test_fit_goes_on_after_a_broken_batch_and_keeps_it(tmp_path, capsys):
    state, _ = run_fit(tmp_path / "a", broken=(2,))
    expected, _ = run_fit(tmp_path / "b", broken=(2,), carry_on=True)
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(expected.params))
    rows = logged(tmp_path / "a")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0]
    assert ["loss" in row for row in rows] == ["grad_norm" in row for row in rows] == [True] * 2 + [False] + [True] * 4
    with np.load(tmp_path / "a" / "bad_batches" / "step-3.npz") as batch:
        _, _, data = cases()["sft"]
        assert set(batch) == {f"rows.{name}" for name in ("prompt", "prompt_len", "response", "response_len", "key")}
        np.testing.assert_array_equal(batch["rows.response"], np.roll(data.response, 2, 0))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("update skipped") == 1
    assert "sft step 3: loss or gradient is not finite; update skipped (1 in a row); batch in" in printed


def test_skips_are_counted_through_a_kill_and_few_batches_are_kept(tmp_path):
    broken = (0, 2, 3, 4, 6)
    whole, _ = run_fit(tmp_path / "whole", steps=8, broken=broken)
    with pytest.raises(RuntimeError, match="killed"):
        run_fit(tmp_path / "killed", steps=8, broken=broken, die_at=5)
    resumed, _ = run_fit(tmp_path / "killed", steps=8, broken=broken)
    assert (int(resumed.skipped), int(resumed.skipped_in_a_row), int(resumed.step)) == (5, 0, 3)
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(resumed))
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        assert sorted(path.name for path in (folder / "bad_batches").iterdir()) == [f"step-{k}.npz" for k in (1, 3, 4)]
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


def test_too_many_skips_in_a_row_stop_the_run(tmp_path):
    """Skips before a kill count: 4 in a row are reached by a run that makes only three of them."""
    broken = (1, 3, 4, 5, 6)
    with pytest.raises(RuntimeError, match="killed"):
        run_fit(tmp_path, steps=9, broken=broken, die_at=5, stop_after_skipped=4)
    started = []
    message = (
        r"sft: the loss or the gradient was not finite in 4 updates in a row, up to step 7\..*bad_batches: look at "
        r"their rows, or lower the learning rate. sft.train.stop_after_skipped=4"
    )
    with pytest.raises(UserError, match=message):
        run_fit(tmp_path, steps=9, broken=broken, at=started.append, stop_after_skipped=4)
    assert started == [4, 5, 6, 7], "the host looks at a step when the next one is under way"


def test_the_last_step_s_skip_is_told_too(tmp_path, capsys):
    run_fit(tmp_path, steps=2, broken=(1,))
    assert "step 2: loss or gradient is not finite" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="up to step 2"):
        run_fit(tmp_path / "b", steps=2, broken=(1,), stop_after_skipped=1)


def test_sigterm_saves_after_the_step_at_hand(tmp_path):
    """Between two checkpoints and two logged steps; the next call goes on, and log and state end as without it."""
    options = {"steps": 9, "log_every": 4, "checkpoint_every": 5}
    before = signal.getsignal(signal.SIGTERM)
    whole, _ = run_fit(tmp_path / "whole", **options)
    with pytest.raises(Preempted, match="terminated; a checkpoint of step 3 is saved; the same command goes on") as end:
        run_fit(tmp_path / "ended", **options, at=lambda k: k == 2 and signal.raise_signal(signal.SIGTERM))
    assert end.value.step == 3 and signal.getsignal(signal.SIGTERM) == before
    made = []
    resumed, _ = run_fit(tmp_path / "ended", **options, at=made.append)
    assert made == [3, 4, 5, 6, 7, 8]
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(resumed))
    assert logged(tmp_path / "whole") == logged(tmp_path / "ended")
    assert [row["step"] for row in logged(tmp_path / "ended")] == [1, 4, 5, 8, 9]


def test_sigterm_in_the_last_step_is_not_lost(tmp_path):
    """There is nothing left to save for: the stage is done, and then the process ends as it would without a handler."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        state, _ = run_fit(tmp_path, steps=3, at=lambda k: k == 2 and signal.raise_signal(signal.SIGTERM)), None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [True] and int(state[0].step) == 3


def test_a_run_that_is_told_where_to_stop_stops_there(tmp_path):
    for step, folder in ((4, "due"), (5, "between"), (7, "last")):
        with stopping_at(step), pytest.raises(Preempted) as end:
            run_fit(tmp_path / folder)
        assert end.value.step == step and (tmp_path / folder / "checkpoints" / str(step)).is_dir()
    assert int(run_fit(tmp_path / "due")[0].step) == 7


def test_checkpoints_are_kept_by_metric(tmp_path):
    def kept(folder):
        return sorted(int(path.name) for path in (tmp_path / folder / "checkpoints").iterdir())

    run_fit(tmp_path / "last", steps=9, keep_checkpoints=1)
    assert kept("last") == [8]
    run_fit(tmp_path / "best", steps=9, keep_checkpoints=1, best_metric="loss", best_mode="max")
    losses = {row["step"]: row["loss"] for row in logged(tmp_path / "best") if row["step"] in (2, 4, 6, 8)}
    best = max(losses, key=losses.__getitem__)
    assert best != 8 and kept("best") == [best, 8]
    with pytest.raises(
        UserError, match=r"sft.train.best_metric=losss is not logged; known here: grad_norm, loss, skipped"
    ):
        run_fit(tmp_path / "none", best_metric="losss")


def test_the_folder_holds_the_configuration(tmp_path):
    run_fit(tmp_path, steps=1)
    assert load_config(tmp_path / "config.yaml") == Config(runtime=RuntimeConfig(tensorboard=False))


def test_init_state_leaves_the_given_parameters_usable():
    """Steps donate their state; the caller's own copy of the parameters must survive that."""
    objective, params, data = cases()["sft"]
    mesh, optim = mesh_of(1, 1, 1), OptimConfig()
    with jax.set_mesh(mesh):
        before = jax.device_get(params)
        step = jax.jit(make_update(objective, optim, accumulation=1), donate_argnums=0)
        step(init_state(params, optim, mesh), jax.tree.map(jnp.asarray, data), jnp.asarray(0.1))
        chex.assert_trees_all_equal(before, jax.device_get(params))
