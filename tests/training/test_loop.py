"""mpo_jax.training.loop: the host loop resumes where it was, bears broken batches, and stops when it is told to."""

import dataclasses
import json
import signal
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax.config.schema import OptimConfig
from mpo_jax.errors import Preempted, UserError
from mpo_jax.runtime.preemption import stopping_at
from mpo_jax.runtime.stage_warnings import collect_warnings
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.hashes import leaf_hashes, state_hash
from mpo_jax.training.loop import Checkpointing, Fitted, Hooks, fit
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state, make_update
from mpo_jax.types import Mean, Params, TrainState, trainable
from tests.models.tiny import mesh_of
from tests.training.test_update import cases, parted


class Batches:
    """Batch k is the rows turned by k with a factor of the loss, and its number."""

    def __init__(self, data: Any, broken: tuple[int, ...]):
        self.data, self.broken = data, broken

    def __getitem__(self, k: int) -> tuple[int, Any, np.ndarray]:
        factor = np.nan if k in self.broken else 1.0
        return k, jax.tree.map(lambda x: np.roll(x, k, 0), self.data), np.full(8, factor, np.float32)


def run_fit(
    folder,
    *,
    steps=7,
    broken=(),
    die_at=None,
    at: Callable[[int], Any] | None = None,
    carry_on=False,
    optimizer: Any = None,
    params: Params | None = None,
    checkpoint_every=2,
    keep_checkpoints=2,
    log_every=1,
    **hooks: Any,
) -> Fitted:
    """SFT steps through `fit`; batches `broken` give no finite number, and `at(k)` is called in step k.

    `carry_on`: without the guard, as a reference for what a run without the broken batches gives. `optimizer`: has its
    rate from itself; without one, AdamW is given a rate every step.
    """
    objective, tree, data = cases()["sft"]
    params = params or trainable(tree)
    own_rate, mesh = optimizer is not None, mesh_of(1, 1, 1)
    optimizer = optimizer or make_optimizer(OptimConfig())

    def poisoned(params, batch):
        rows, poison_B = batch
        terms, metrics = objective(params, rows)
        loss = terms["loss"]
        return {"loss": Mean(loss.total * poison_B[0], loss.count)}, metrics

    with jax.set_mesh(mesh):
        update = jax.jit(make_update(poisoned, optimizer), donate_argnums=0)

        def step(state: TrainState, batch: Any) -> Any:
            k, rows, factor = batch
            if k == die_at:
                raise RuntimeError("killed")
            if at is not None:
                at(k)
            if k in broken and carry_on:
                return state, {}
            if not own_rate:
                state = with_learning_rate(state, 0.01 * (k + 1))
            return *update(state, (rows, factor), params["frozen"]), {"rows": rows}

        return fit(
            init_state(params, optimizer, mesh),
            step,
            Batches(data, broken),
            num_steps=steps,
            name="sft",
            folder=folder,
            hooks=Hooks(log_every=log_every, **hooks),
            checkpoints=Checkpointing(folder / "checkpoints", every=checkpoint_every, keep=keep_checkpoints),
        )


def logged(folder) -> list[dict]:
    """The lines of the log, without what no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))} for row in rows]


def test_fit_resumes_and_ends_equal_to_an_uninterrupted_run(tmp_path, capsys):
    """Killed between two checkpoints: the same call again ends bit-identical, and the log is the same."""
    whole, last = run_fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run_fit(tmp_path / "killed", die_at=5)
    resumed, resumed_last = run_fit(tmp_path / "killed")
    assert int(resumed.step) == 7
    assert "  sft: resumes from the checkpoint of step 4 of 7\n" in capsys.readouterr().out
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(resumed))
    assert last["train"]["loss"] == resumed_last["train"]["loss"]
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    hashes = [row.get("state_hash") for row in logged(tmp_path / "whole")]
    assert [bool(digest) for digest in hashes] == [False, True, False, True, False, True, True]
    assert hashes[-1] == state_hash(leaf_hashes(whole))


@pytest.mark.thorough
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


def test_fit_goes_on_after_a_broken_batch_and_keeps_it(tmp_path, capsys):
    state, _ = run_fit(tmp_path / "a", broken=(2,))
    expected, _ = run_fit(tmp_path / "b", broken=(2,), carry_on=True)
    chex.assert_trees_all_equal(jax.device_get(state.trainable), jax.device_get(expected.trainable))
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


@pytest.mark.thorough
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
        r"sft: the loss or the gradient was not finite in 4 updates in a row, up to step 7\. Look at the rows of "
        r"the first batches, in .*bad_batches, or lower the learning rate. sft.train.stop_after_skipped=4"
    )
    with pytest.raises(UserError, match=message):
        run_fit(tmp_path, steps=9, broken=broken, at=started.append, stop_after_skipped=4)
    assert started == [4, 5, 6, 7], "the host looks at a step when the next one is under way"


def test_the_last_step_s_skip_is_told_too(tmp_path, capsys):
    run_fit(tmp_path, steps=2, broken=(1,))
    assert "step 2: loss or gradient is not finite" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="up to step 2"):
        run_fit(tmp_path / "b", steps=2, broken=(1,), stop_after_skipped=1)


def test_a_signal_saves_after_the_step_at_hand(tmp_path):
    """Between two checkpoints and two logged steps; the next call goes on, and log and state end as without it."""
    options = {"steps": 9, "log_every": 4, "checkpoint_every": 5}
    before = signal.getsignal(signal.SIGINT)
    whole, _ = run_fit(tmp_path / "whole", **options)
    with pytest.raises(Preempted, match="after step 3, which is saved; the same command goes on from there") as end:
        run_fit(tmp_path / "ended", **options, at=lambda k: k == 2 and signal.raise_signal(signal.SIGINT))
    assert end.value.step == 3 and signal.getsignal(signal.SIGINT) == before
    made = []
    resumed, _ = run_fit(tmp_path / "ended", **options, at=made.append)
    assert made == [3, 4, 5, 6, 7, 8]
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(resumed))
    assert logged(tmp_path / "whole") == logged(tmp_path / "ended")
    assert [row["step"] for row in logged(tmp_path / "ended")] == [1, 4, 5, 8, 9]


@pytest.mark.thorough
def test_a_signal_in_the_last_step_saves_it_too(tmp_path):
    """What follows, the export of a large model, may take longer than a user waits. No step is made again."""
    whole, summary = run_fit(tmp_path / "whole", steps=3)
    with pytest.raises(Preempted) as end:
        run_fit(tmp_path / "ended", steps=3, at=lambda k: k == 2 and signal.raise_signal(signal.SIGTERM))
    made = []
    state, again = run_fit(tmp_path / "ended", steps=3, at=made.append)
    assert end.value.step == 3 and made == []
    assert leaf_hashes(state) == leaf_hashes(whole) and logged(tmp_path / "ended") == logged(tmp_path / "whole")
    kept = lambda train: {k: v for k, v in train.items() if not k.startswith(("timing_s", "perf"))}  # noqa: E731
    assert kept(again["train"]) == kept(summary["train"]) != {}


def test_a_signal_without_checkpoints_is_not_held_back():
    """Nothing could be saved, so nothing is promised."""
    with pytest.raises(KeyboardInterrupt):
        fit({"sum": jnp.int32(0)}, lambda *_: signal.raise_signal(signal.SIGINT), [1, 2])


@pytest.mark.thorough
def test_a_run_that_is_told_where_to_stop_stops_there(tmp_path):
    for step, folder in ((4, "due"), (5, "between"), (7, "last")):
        with stopping_at(step), pytest.raises(Preempted) as end:
            run_fit(tmp_path / folder)
        assert end.value.step == step and (tmp_path / folder / "checkpoints" / str(step)).is_dir()
    assert int(run_fit(tmp_path / "due")[0].step) == 7


@pytest.mark.thorough
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


# ---- any optimiser, a frozen part, and a loop without a stage ------------------------------------------------------


@pytest.mark.thorough
def test_plain_adamw_of_optax_resumes_bit_for_bit(tmp_path):
    """With a schedule of its own: its count is in the state, so a resumed run goes on at its rate."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.05, 2, 7), weight_decay=0.1)
    whole, summary = run_fit(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(RuntimeError, match="killed"):
        run_fit(tmp_path / "killed", optimizer=optimizer, die_at=5)
    made: list[int] = []
    resumed, again = run_fit(tmp_path / "killed", optimizer=optimizer, at=made.append)
    assert made == [4, 5, 6] and int(resumed.step) == 7
    assert leaf_hashes(resumed) == leaf_hashes(whole)
    assert again["train"]["loss"] == summary["train"]["loss"] and logged(tmp_path / "whole") == logged(
        tmp_path / "killed"
    )
    start = trainable(cases()["sft"][1])["trainable"]
    assert np.abs(whole.trainable["embedding"] - start["embedding"]).max() > 1e-2


@pytest.mark.thorough
def test_a_frozen_part_is_in_no_checkpoint_and_a_resumed_run_ends_alike(tmp_path):
    params = parted(cases()["sft"][1])
    before = jax.device_get(params["frozen"])
    whole, _ = run_fit(tmp_path / "whole", params=params)
    with pytest.raises(RuntimeError, match="killed"):
        run_fit(tmp_path / "killed", params=params, die_at=5)
    checkpoints = Checkpoints(tmp_path / "killed" / "checkpoints", keep=2)
    leaves, frozen = set(checkpoints.record(4)["leaves"]), jax.tree_util.tree_leaves_with_path(before)
    checkpoints.close()
    assert any(name.startswith(".trainable['layers']['attention']") for name in leaves)
    assert not [name for name in leaves for path, _ in frozen if name.endswith(jax.tree_util.keystr(path))]
    resumed, _ = run_fit(tmp_path / "killed", params=params)
    assert leaf_hashes(resumed) == leaf_hashes(whole)
    chex.assert_trees_all_equal(before, jax.device_get(params["frozen"]))


def counting(state: Any, batch: int) -> tuple[Any, dict[str, Any]]:
    return {"sum": state["sum"] + batch}, {"batch": jnp.float32(batch)}


class Lines:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.failed: bool | None = None

    def write(self, step, values):
        self.lines.append((step, dict(values)))

    def close(self, *, failed=False):
        self.failed = failed


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    """Any state, as many steps as there are batches; and lines go to sinks all the same."""
    monkeypatch.chdir(tmp_path)
    sink = Lines()
    state, summary = fit({"sum": jnp.int32(0)}, counting, [3, 4, 5], hooks=Hooks(log_every=2, log=(sink,)))
    assert int(state["sum"]) == 12 and (summary["steps"], summary["best"]) == (3, None)
    assert [(step, values["batch"]) for step, values in sink.lines] == [(1, 3), (2, 4), (3, 5)]
    assert sink.failed is False and summary["train"]["batch"] == 5
    assert list(tmp_path.iterdir()) == []


def test_a_skipped_update_without_a_folder_is_told_and_kept_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    optimizer, params = optax.sgd(0.1), {"norm": {"scale": jnp.ones(2)}}
    broken = lambda tree, batch_B: ({"loss": Mean.of(tree["norm"]["scale"].sum() * batch_B)}, {})  # noqa: E731
    state = init_state(trainable(params), optimizer, mesh_of(1, 1, 1))
    with pytest.raises(
        UserError, match=r"in 2 updates in a row, up to step 2\. Look at the batches, or lower the lear"
    ):
        fit(state, make_update(broken, optimizer), [np.full(2, np.nan)] * 9, hooks=Hooks(stop_after_skipped=2))
    assert "train step 1: loss or gradient is not finite" in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []


def test_sinks_are_told_that_a_run_broke_off(tmp_path):
    """Also before its first step."""
    sink, other = Lines(), Lines()
    with pytest.raises(ZeroDivisionError):
        fit({"sum": jnp.int32(0)}, lambda state, batch: 1 // 0, [1], hooks=Hooks(log=(sink,)))
    saved = Checkpointing(tmp_path, every=1, recipe={"stage": "a"})
    fit({"sum": jnp.int32(0)}, counting, [1, 2], checkpoints=saved)
    with pytest.raises(UserError, match="stage is a in the checkpoint and b now"):
        refused = dataclasses.replace(saved, recipe={"stage": "b"})
        fit({"sum": jnp.int32(0)}, counting, [1, 2], checkpoints=refused, hooks=Hooks(log=(other,)))
    assert (sink.failed, other.failed, other.lines) == (True, True, [])


def least_squares(tree: Any, batch: Any) -> Any:
    return {"loss": Mean.of((tree["w"] - batch) ** 2)}, {}


def fit_plain(folder, optimizer, *, steps=4, hooks=None, batches=None) -> Fitted:
    """Least squares of parameters that the package's models do not have."""
    with jax.set_mesh(mesh_of(1, 1, 1)):
        state = init_state(trainable({"w": jnp.zeros(3)}), optimizer, mesh_of(1, 1, 1))
        step = jax.jit(make_update(least_squares, optimizer))
        batches = [jnp.ones(3) * k for k in range(8)] if batches is None else batches
        saved = Checkpointing(folder / "checkpoints", every=2)
        return fit(state, step, batches, num_steps=steps, hooks=hooks, checkpoints=saved)


@pytest.mark.parametrize("other", [optax.adamw(0.1), optax.sgd(0.1)])
def test_a_checkpoint_of_another_optimiser_is_refused_and_stays(tmp_path, other):
    """adam and adamw have equal arrays in different trees; sgd has fewer arrays."""
    fit_plain(tmp_path, optax.adam(0.1))
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(UserError, match="does not fit this configuration"):
        fit_plain(tmp_path, other)
    assert before and sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_fewer_steps_than_a_checkpoint_has_are_refused(tmp_path):
    fit_plain(tmp_path, optax.sgd(0.1), steps=6)
    with pytest.raises(UserError, match="newest checkpoint is of step 4, but num_steps=3"):
        fit_plain(tmp_path, optax.sgd(0.1), steps=3)


def test_values_of_another_metric_choose_no_state(tmp_path):
    """The first run compared eval/loss, by which step 2 was best; the loss falls to the end."""
    measures = iter([0.5, 0.1, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2])
    watched = Hooks(evaluate=lambda _: {"loss": next(measures)}, eval_every=1, best_metric="eval/loss", log_every=1)
    ones = [jnp.ones(3)] * 8
    assert fit_plain(tmp_path, optax.sgd(0.1), hooks=watched, batches=ones).summary["best"]["step"] == 2
    again = fit_plain(tmp_path, optax.sgd(0.1), steps=8, hooks=Hooks(best_metric="loss", log_every=1), batches=ones)
    assert again.summary["best"]["metric"] == "loss" and again.summary["best"]["step"] == 8


def test_an_update_that_is_not_finite_is_skipped_though_its_gradient_is(tmp_path):
    optimizer = optax.sgd(lambda count: jnp.where(count == 2, jnp.nan, 0.1))
    with collect_warnings() as warnings:
        fitted = fit_plain(tmp_path, optimizer)
    assert np.isfinite(fitted.state.trainable["w"]).all() and int(fitted.state.skipped) == 2
    assert "skipped 2 of 4" in warnings[0]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Hooks(log_every=0), "log_every=0 must be at least 1"),
        (lambda: Hooks(best_mode="mx"), "must be min or max"),  # type: ignore[arg-type]
        (lambda: Hooks(best_metric="eval/loss"), "needs evaluate and eval_every"),
        (lambda: Checkpointing("folder", every=0), "must be at least 1"),  # type: ignore[arg-type]
        (lambda: fit(0, lambda s, b: (s, {}), iter([1])), "must be indexed"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_told_before_the_first_step(mistake, message):
    with pytest.raises(UserError, match=message):
        mistake()


def test_a_given_state_is_freed_once_a_checkpoint_replaces_it(tmp_path):
    """Callers hold the state that they give until `fit` returns: two states would be in memory all that time."""

    def run() -> tuple[dict, dict]:
        given = {"w": jnp.zeros(3)}
        checkpoints = Checkpointing(tmp_path / "checkpoints", every=1)
        step = lambda state, batch: ({"w": state["w"] + batch}, {"loss": batch})  # noqa: E731
        return given, fit(given, step, [1.0, 2.0, 3.0], folder=tmp_path, checkpoints=checkpoints).state

    given, first = run()
    assert not given["w"].is_deleted()
    given, again = run()
    assert given["w"].is_deleted()
    np.testing.assert_array_equal(first["w"], again["w"])
