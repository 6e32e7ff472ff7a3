"""Measures on held-out rows while a stage trains: when they are made, where they are written, and what is exported."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config, TrainConfig
from mpo_jax.errors import Preempted, UserError
from mpo_jax.pipeline.bucket import Bucket, checkpoint_folder
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.table import Listing
from mpo_jax.runtime.preemption import stopping_at
from mpo_jax.stages.context import Context, Inputs
from mpo_jax.stages.fitting import fit_stage
from mpo_jax.stages.settings import TrainSettings, Watch
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.hashes import leaf_hashes, state_hash
from mpo_jax.training.loop import Hooks, fit
from mpo_jax.training.validation import first_rows, means
from mpo_jax.types import Mean, Skips
from tests.models.tiny import mesh_of

BEST = {"best_metric": "eval/loss", "eval_every": 1, "log_every": 4, "checkpoint_every": 4, "keep_checkpoints": 1}


def run(
    folder: Path, *, steps: int = 9, lowest: float = 3, stop: int | None = None, bucket: str | None = None,
    evaluate: Any = "distance", skipped: tuple[int, ...] = (), warmup: int = 0, **train: Any,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """A state that counts its steps; its held-out loss is the distance from `lowest`, its training loss the step.

    `train` is keys of a stage's section `train`.
    """

    def step(state, k):
        if k == stop:
            raise RuntimeError("killed")
        skips = Skips(jnp.int32(k + 1 in skipped), jnp.int32(k + 1 in skipped))
        loss = Mean(jnp.float32(k + 1), jnp.float32(0 if k + 1 in skipped else 1))
        metrics = {"loss": loss, "skipped": skips} | ({"late": jnp.float32(-k)} if k + 1 > warmup else {})
        return {"count": state["count"] + 1, "half": state["half"] + 0.5}, metrics, None

    def distance(state):
        return {"loss": abs(float(state["count"]) - lowest), "accuracy": float(state["count"]) / 100}

    config = TrainConfig(batch_size=8, **train)
    context = Context(
        mesh=mesh_of(1, 1, 1),
        folder=folder,
        inputs=Inputs(Config()),
        watch=Watch.of(config),
        checkpoints=checkpoint_folder(None if bucket is None else Bucket(bucket), folder),
    )
    return fit_stage(
        "sft",
        {"count": jnp.int32(0), "half": jnp.float32(0)},
        step,
        range(steps),
        steps=steps,
        train=TrainSettings.of(config),
        context=context,
        evaluate=distance if evaluate == "distance" else evaluate,
        warmup=warmup,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))} for row in rows]


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_measures_are_made_every_so_often_and_at_the_end_and_leave_training_s_log_alone(tmp_path):
    plain, _ = run(tmp_path / "plain", log_every=5, evaluate=None)
    state, summary = run(tmp_path / "measured", log_every=5, eval_every=2)
    assert leaf_hashes(state) == leaf_hashes(plain)
    measured = {row["step"]: row for row in lines(tmp_path / "measured")}
    assert {step for step, row in measured.items() if "eval/loss" in row} == {2, 4, 6, 8, 9}
    assert [(measured[k]["eval/loss"], measured[k]["eval/accuracy"]) for k in (2, 9)] == [(1, 0.02), (6, 0.09)]
    assert measured[2].keys() == {"step", "eval/loss", "eval/accuracy"}, "a step without a line gets one of its own"
    without = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in measured.values()]
    assert [row for row in without if len(row) > 1] == lines(tmp_path / "plain")
    assert len(measured) == len(lines(tmp_path / "measured")), "no step has two lines"
    assert summary["train"]["eval/loss"] == 6 and summary["train"]["timing_s/eval"] > 0 and summary["best"] is None
    assert not (tmp_path / "measured" / "checkpoints" / "2").exists(), "nothing is saved for a measure without a metric"


def test_the_best_state_is_exported(tmp_path, capsys):
    state, summary = run(tmp_path, **BEST)
    assert (int(state["count"]), float(state["half"])) == (3, 1.5)
    assert summary["best"] == {"step": 3, "metric": "eval/loss", "value": 0.0}
    assert summary["steps"] == 9 and summary["train"]["eval/loss"] == 6
    assert "the best eval/loss is 0, of step 3 of 9: that state is exported" in " ".join(
        capsys.readouterr().out.split()
    )
    assert checkpoints_of(tmp_path / "checkpoints") == [3, 8], "the best one and the last one"
    hashes = {row["step"]: row.get("state_hash") for row in lines(tmp_path)}
    assert hashes[3] == state_hash(leaf_hashes(state)), "mpo verify can start and end there"
    assert [step for step, digest in hashes.items() if digest] == [1, 2, 3, 4, 8, 9]


def test_the_last_state_is_a_candidate_and_of_equals_the_earliest_is_taken(tmp_path):
    state, summary = run(tmp_path / "last", lowest=9, **BEST)
    assert int(state["count"]) == 9 == summary["best"]["step"]
    state, summary = run(tmp_path / "equal", evaluate=lambda state: {"loss": 1.0}, **BEST)
    assert int(state["count"]) == 1 == summary["best"]["step"]


def test_higher_is_better_where_the_name_or_the_config_says_so(tmp_path):
    _, summary = run(tmp_path / "name", **{**BEST, "best_metric": "eval/accuracy"})
    assert summary["best"] == {"step": 9, "metric": "eval/accuracy", "value": 0.09}
    _, summary = run(tmp_path / "config", **{**BEST, "best_metric": "eval/accuracy", "best_mode": "min"})
    assert summary["best"] == {"step": 1, "metric": "eval/accuracy", "value": 0.01}
    _, summary = run(tmp_path / "max", **{**BEST, "best_mode": "max"})
    assert summary["best"]["step"] == 9


def test_a_metric_of_training_compares_checkpoints_and_the_last_state(tmp_path):
    """By the average since the line before: 1, then 2 to 4, 5 to 8, and 9."""
    options = {**BEST, "best_metric": "loss", "best_mode": "max", "eval_every": None}
    state, summary = run(tmp_path / "max", **options)
    assert summary["best"] == {"step": 9, "metric": "loss", "value": 9.0} and int(state["count"]) == 9
    state, summary = run(tmp_path / "min", **{**options, "best_mode": "min"})
    assert summary["best"] == {"step": 4, "metric": "loss", "value": 3.0} and int(state["count"]) == 4


@pytest.mark.parametrize("where", ["workdir", "bucket"])
def test_a_run_that_was_killed_after_its_best_state_knows_it(tmp_path, where):
    """And ends with the same state, summary and log as one that was not; also where its checkpoints lie in a bucket."""
    places = {name: f"file://{tmp_path}/{name}-bucket" if where == "bucket" else None for name in ("whole", "killed")}
    whole, summary = run(tmp_path / "whole", bucket=places["whole"], **BEST)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", bucket=places["killed"], stop=6, **BEST)
    place = checkpoint_folder(Bucket(places["killed"]) if places["killed"] else None, tmp_path / "killed")
    assert checkpoints_of(Path(place)) == [3, 4]
    resumed, again = run(tmp_path / "killed", bucket=places["killed"], **BEST)
    assert leaf_hashes(resumed) == leaf_hashes(whole) and again["best"] == summary["best"]
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert checkpoints_of(Path(place)) == [3, 8]


def test_a_run_that_was_ended_between_two_measures_goes_on_as_if_it_had_not(tmp_path):
    options = {**BEST, "eval_every": 3, "lowest": 6}
    whole, summary = run(tmp_path / "whole", **options)
    with stopping_at(5), pytest.raises(Preempted):
        run(tmp_path / "ended", **options)
    resumed, again = run(tmp_path / "ended", **options)
    assert int(resumed["count"]) == 6 and leaf_hashes(resumed) == leaf_hashes(whole)
    assert again["best"] == summary["best"] and lines(tmp_path / "ended") == lines(tmp_path / "whole")


def test_a_stage_that_ended_at_its_last_step_still_exports_its_best(tmp_path):
    """As where the machine went after the last checkpoint and before the model was written."""
    with stopping_at(9), pytest.raises(Preempted):
        run(tmp_path / "first", **BEST)
    assert int(run(tmp_path / "first", **BEST)[0]["count"]) == 3
    with stopping_at(9), pytest.raises(Preempted):
        run(tmp_path / "last", lowest=9, **BEST)
    assert run(tmp_path / "last", lowest=9, **BEST)[1]["best"] == {"step": 9, "metric": "eval/loss", "value": 0.0}


def test_a_measure_that_is_not_finite_is_told_and_never_the_best(tmp_path, capsys):
    def evaluate(state):
        count = float(state["count"])
        return {"loss": math.nan if count == 3 else -math.inf if count == 4 else count}

    state, summary = run(tmp_path / "some", evaluate=evaluate, **BEST)
    assert int(state["count"]) == 1 and summary["best"]["value"] == 1
    assert [row["step"] for row in lines(tmp_path / "some") if "eval/loss" not in row] == [3, 4]
    printed = " ".join(capsys.readouterr().out.split())
    assert "sft step 3: not finite on the held-out rows: eval/loss" in printed and "step 4: not finite" in printed
    state, summary = run(tmp_path / "all", evaluate=lambda state: {"loss": math.nan}, **BEST)
    assert int(state["count"]) == 9 and summary["best"] is None
    assert "eval/loss has no finite value, so the last state is exported" in " ".join(capsys.readouterr().out.split())


def test_a_broken_best_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, stop=8, **BEST)
    for path in (tmp_path / "checkpoints" / "3" / "state" / "d").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"checkpoints/3 is broken: .* Remove it, and the same command goes on"):
        run(tmp_path, **BEST)


def test_a_metric_of_training_that_is_misspelt_is_found_at_the_first_step(tmp_path):
    message = r"sft.train.best_metric=los is not logged; known here: late, loss, skipped$"
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a", **{**BEST, "best_metric": "los", "checkpoint_every": 500})
    assert len(lines(tmp_path / "a")) == 1
    run(tmp_path / "b", warmup=5, **{**BEST, "best_metric": "late"})
    _, summary = run(tmp_path / "c", skipped=(1, 4), **{**BEST, "best_metric": "loss", "log_every": 1})
    assert summary["best"]["step"] == 8, "a checkpoint whose updates were skipped has no value"


def test_a_best_state_needs_checkpoints():
    """It is restored from one."""
    step = lambda state, _: (state, {"loss": jnp.float32(0)})  # noqa: E731
    with pytest.raises(UserError, match="mine: best_metric=loss needs checkpoints, from which the best state is rest"):
        fit({"count": jnp.int32(0)}, step, range(1), name="mine", hooks=Hooks(best_metric="loss"))


def test_the_best_is_known_to_the_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, best="max")
    assert checkpoints.best() is None and checkpoints.improves(-5.0)
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, None)):
        checkpoints.save(step, {"x": jnp.float32(step)}, value=value)
    assert checkpoints.best() == (2, 0.7)
    assert not checkpoints.improves(0.7) and checkpoints.improves(0.71)
    sharding = jnp.float32(0).sharding
    found = checkpoints.load(2, {"x": jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)})
    checkpoints.close()
    assert float(found["x"]) == 2


def test_means_over_batches_have_one_division():
    batches = [{"a": Mean(np.float32(1), np.float32(1))}, {"a": Mean(np.float32(6), np.float32(3))}]
    assert means(batches) == {"a": 1.75}
    assert math.isnan(means([{"a": Mean(np.float32(np.inf), np.float32(1))}])["a"])


def test_the_same_first_rows_are_taken_each_time():
    rows = list(range(300))
    assert first_rows(rows, TrainConfig(), "sft") == []
    assert first_rows(rows, TrainConfig(eval_every=1), "sft") == rows[:256]
    assert first_rows(rows, TrainConfig(eval_every=1), "ppo", default=64) == rows[:64]
    assert first_rows(rows, TrainConfig(eval_every=1, eval_rows=3), "sft") == [0, 1, 2]
    with pytest.raises(UserError, match=r"reward.train.eval_every=1 needs held-out rows.*data.validation_fraction"):
        first_rows([], TrainConfig(eval_every=1), "reward")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("sft.train.best_metric=eval/loss",),
            r"sft.train.best_metric=eval/loss is measured .* set sft.train.eval_every",
        ),
        (
            ("reward.train.best_metric=eval/acuracy", "reward.train.eval_every=5"),
            r"reward.train.best_metric=eval/acuracy is no measure of reward; did you mean eval/accuracy\?",
        ),
        (
            ("dpo.train.eval_every=5", "data.kind=pairs", "data.path=rows.jsonl", "data.validation_fraction=0"),
            r"dpo.train.eval_every=5 needs held-out rows: name .*data.test_path, or raise data.validation_fraction",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


def name_of(tmp_path, *overrides: str) -> str:
    return Pipeline(load_config(None, overrides), Listing(tmp_path)).sft().id


def test_measures_change_a_stage_s_name_only_where_they_choose_the_state(tmp_path):
    """A metric on held-out rows by when and on what it is measured; a metric of training by where it is averaged."""
    every, rows, mode = "sft.train.eval_every=2", "sft.train.eval_rows=9", "sft.train.best_mode=max"
    saved, log = "sft.train.checkpoint_every=3", "sft.train.log_every=3"
    plain = name_of(tmp_path)
    assert {name_of(tmp_path, key) for key in (every, rows, mode, saved, log)} == {plain}
    held_out = (every, "sft.train.best_metric=eval/loss")
    chosen = name_of(tmp_path, *held_out)
    changed = [name_of(tmp_path, *held_out, key) for key in (rows, mode, "sft.train.eval_every=3")]
    assert len({plain, chosen, *changed}) == 5
    assert {name_of(tmp_path, *held_out, key) for key in (saved, log, "sft.train.keep_checkpoints=7")} == {chosen}
    training = "sft.train.best_metric=loss"
    chosen = name_of(tmp_path, training)
    assert len({plain, chosen, *(name_of(tmp_path, training, key) for key in (saved, log, mode))}) == 5
    assert {name_of(tmp_path, training, key) for key in (every, rows)} == {chosen}
