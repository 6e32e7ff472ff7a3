"""mpo_jax.training.tracker: exact averages, a JSON line a logged step, and a file that a resumed run continues."""

import io
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mpo_jax.training.tracker import COMPILE_EVENT, PEAK_S, Tracker, add_up, mean_values, step_line
from mpo_jax.types import Mean, Skips


def mean(total: float, count: float) -> Mean:
    return Mean(jnp.float32(total), jnp.float32(count))


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def averages(steps: list[dict]) -> dict[str, float]:
    return mean_values(add_up(steps, {}))


def test_means_are_added_before_dividing():
    """(1 + 6) / (1 + 3), where the mean of the means would be 1.5."""
    steps = [{"loss": mean(1, 1), "norm": 1.0}, {"loss": mean(6, 3), "norm": np.float32(4.0)}]
    assert averages(steps) == {"loss": 1.75, "norm": 2.5}
    assert averages([{"loss": mean(3, 0)}, {"loss": mean(-1, 2)}]) == {"loss": 1.0}


def test_what_has_no_number_is_left_out():
    """A Mean of nothing is not 0, and NaN is no JSON; a scalar of a skipped step does not spoil the others'."""
    nan = float("nan")
    steps = [{"loss": mean(0, 0), "norm": nan, "kl": mean(nan, 1)}, {"loss": mean(0, 0), "norm": 3.0, "kl": mean(1, 1)}]
    assert averages(steps) == {"norm": 3.0}
    assert averages(steps[:1]) == {}


def test_skips_are_counted():
    steps = [{"skipped": Skips(jnp.int32(count), jnp.int32(7))} for count in (1, 0, 2)]
    assert averages(steps) == {"skipped": 3.0}


def test_sums_may_be_taken_in_parts_that_were_json_between():
    """As a run does that is ended between two logged steps and goes on: the same to the bit."""
    rng = np.random.default_rng(0)
    steps = [
        {"loss": mean(*rng.random(2)), "norm": rng.random(), "skipped": Skips(jnp.int32(k), jnp.int32(0))}
        for k in range(9)
    ]
    first = json.loads(json.dumps(add_up(steps[:4], {})))
    assert mean_values(add_up(steps[4:], {name: tuple(pair) for name, pair in first.items()})) == averages(steps)


def test_sums_are_taken_in_float64():
    """A float32 sum of these would lose every 1."""
    assert averages([{"loss": mean(2.0**25, 0)}, *[{"loss": mean(1, 0.5)}] * 4])["loss"] == (2.0**25 + 4) / 2


def test_a_line_a_logged_step_with_all_since_the_last(tmp_path):
    tracker = Tracker(tmp_path / "stage", "sft", 5, tensorboard=False)
    results = [
        tracker.update(k, {"loss": mean(k, 1), "grad_norm": jnp.float32(2 * k)}, log=k in (1, 3, 5))
        for k in range(1, 6)
    ]
    tracker.close()
    assert results[1] is results[3] is None
    written = lines(tmp_path / "stage")
    assert [{k: line[k] for k in ("step", "loss", "grad_norm")} for line in written] == [
        {"step": 1, "loss": 1.0, "grad_norm": 2.0},
        {"step": 3, "loss": 2.5, "grad_norm": 5.0},
        {"step": 5, "loss": 4.5, "grad_norm": 9.0},
    ]
    assert results[4] == {k: v for k, v in written[2].items() if k != "step"}
    assert ["timing_s/step" in line for line in written] == [False, True, True]
    assert ["timing_s/compile" in line for line in written] == [True, False, False]
    assert all(type(value) is float for name, value in results[4].items())


def test_the_bar_says_that_it_compiles_until_the_first_step(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    monkeypatch.setattr("mpo_jax.training.tracker.console", console)
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    for step, note in ((0, "compiling"), (1, ""), (2, "loss 1")):
        if step:
            tracker.update(step, {"loss": mean(1, 1)}, log=step == 2)
        assert tracker._bar is not None and tracker._bar.tasks[0].fields["note"] == note
    tracker.close()
    assert "compiling" in console.file.getvalue()  # type: ignore[attr-defined]


def test_time_is_told_per_step_and_tokens_as_a_rate(tmp_path, monkeypatch):
    """Made at 100 s; steps end at 101, 103 and 105 s: one of 1 s that compiled, two of 2 s with 650 tokens each."""
    clock = iter([100.0, 101.0, 103.0, 105.0])
    monkeypatch.setattr("mpo_jax.training.tracker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    results = [tracker.update(k, {"tokens": np.float32(100 * k * k)}, log=k != 2) for k in (1, 2, 3)]
    tracker.close()
    assert results == [{"timing_s/compile": 1.0}, None, {"timing_s/step": 2.0, "perf/tokens_per_s": 325.0}]


def test_the_rate_of_a_pass_is_that_since_its_start(tmp_path, monkeypatch):
    """Two batches after 10 s, 4 of them in the compiler, almost at once: neither had the devices for itself."""
    clock = iter([100.0, 110.0, 110.001, 118.0])
    monkeypatch.setattr("mpo_jax.training.tracker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tracker = Tracker(tmp_path, "evaluate", 96, tensorboard=False, bursts=True)
    jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 4.0)
    found = [tracker.update(32 * k, {"tokens": 1000 * k}, log=True) for k in (1, 2, 3)]
    tracker.close()
    seconds, tokens = (6.0, 6.001, 14.0), (1000, 3000, 6000)
    assert found == [
        {"timing_s/step": pytest.approx(s / k), "perf/tokens_per_s": pytest.approx(n / s)}
        for k, s, n in zip((1, 2, 3), seconds, tokens, strict=True)
    ]


def test_utilisation_is_the_time_at_the_peak_over_the_time_it_took(tmp_path, monkeypatch):
    """Steps of 2 s whose arithmetic takes 0.5 and 0.7 s at the peak; one stops between them, and another goes on."""
    clock = iter([100.0, 101.0, 103.0, 200.0, 202.0, 204.0])
    monkeypatch.setattr("mpo_jax.training.tracker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    assert tracker.update(1, {PEAK_S: 9.0}, log=True) == {"timing_s/compile": 1.0}
    assert tracker.update(2, {PEAK_S: 0.5}, log=False) is None
    sums = json.loads(json.dumps(tracker.unlogged()))
    tracker.close()
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False, start_step=2, sums=sums)
    tracker.update(3, {PEAK_S: np.float32(0.75)}, log=False)
    assert tracker.update(4, {PEAK_S: 1.0}, log=True) == {
        "timing_s/compile": 2.0, "timing_s/step": 2.0, "perf/mfu": (0.5 + 0.75 + 1.0) / 3 / 2.0
    }  # fmt: skip
    tracker.close()


def test_later_compilation_is_told_apart_from_the_steps(tmp_path, monkeypatch):
    """A run that resumes at step 4: its first step, and 3 of the next 4 s, are the compiler's."""
    clock = iter([100.0, 110.0, 112.0, 114.0, 115.0])
    monkeypatch.setattr("mpo_jax.training.tracker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False, start_step=4)
    for k in (5, 6):
        assert tracker.update(k, {}, log=False) is None
    jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 3.0)
    jax.monitoring.record_event_duration_secs("/jax/another/event", 5.0)
    assert tracker.update(7, {"tokens": 10}, log=True) == {
        "timing_s/compile": 13.0, "timing_s/step": 0.5, "perf/tokens_per_s": 20.0
    }  # fmt: skip
    assert tracker.update(8, {}, log=True) == {"timing_s/step": 1.0}
    tracker.close()


def test_a_real_compilation_is_heard(tmp_path):
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    tracker.update(1, {}, log=True)
    assert "timing_s/compile" not in tracker.update(2, {}, log=True)
    jax.jit(lambda x: x * 3.25 + len(str(tmp_path)))(jnp.ones(3)).block_until_ready()
    assert tracker.update(3, {}, log=True)["timing_s/compile"] > 0
    tracker.close()


def test_compilation_that_is_not_timed_is_not_subtracted_twice(tmp_path, monkeypatch):
    """A step of 2 s, then measures of 5 s of which the compiler takes 4."""
    clock = iter([100.0, 110.0, 112.0, 117.0, 117.0])
    monkeypatch.setattr("mpo_jax.training.tracker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    tracker.update(1, {}, log=True)
    with tracker.untimed():
        jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 4.0)
    assert tracker.update(2, {}, log=True) == {"timing_s/compile": 4.0, "timing_s/step": 2.0}
    tracker.close()


def test_measures_are_written_as_they_are_with_the_step_s_line_or_by_themselves(tmp_path, capsys):
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    assert tracker.update(1, {"loss": mean(2, 1)}, log=False, measures={"eval/loss": 0.5}) is None
    found = tracker.update(2, {"loss": mean(4, 1)}, log=True, measures={"eval/loss": 0.25})
    tracker.close()
    assert found is not None and (found["loss"], found["eval/loss"]) == (3, 0.25)
    first, second = lines(tmp_path)
    assert first == {"step": 1, "eval/loss": 0.5} and (second["loss"], second["eval/loss"]) == (3, 0.25)
    printed = capsys.readouterr().out
    assert "sft 1/9  eval loss 0.5" in printed and "sft 2/9  loss 3  eval loss 0.25" in printed


def test_a_line_holds_the_state_s_hash(tmp_path):
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    values = tracker.update(1, {"loss": mean(1, 2)}, log=True, state_hash="abc")
    tracker.close()
    assert lines(tmp_path)[0]["state_hash"] == "abc" and "state_hash" not in values


def test_steps_that_were_not_logged_go_on_in_the_next_process(tmp_path):
    metrics = [{"loss": mean(k, 3), "norm": 0.1 * k} for k in range(1, 7)]
    for folder, parts in (("whole", [metrics]), ("parts", [metrics[:2], metrics[2:4], metrics[4:]])):
        done, sums = 0, None
        for part in parts:
            tracker = Tracker(tmp_path / folder, "sft", 6, tensorboard=False, start_step=done, sums=sums)
            for values in part:
                done += 1
                tracker.update(done, values, log=done in (1, 6))
            sums = json.loads(json.dumps(tracker.unlogged()))
            tracker.close()
    whole, parts = (
        [{k: v for k, v in line.items() if not k.startswith("timing_s")} for line in lines(tmp_path / folder)]
        for folder in ("whole", "parts")
    )
    assert whole == parts and [line["step"] for line in whole] == [1, 6]
    assert whole[1]["loss"] == 20 / 15


def test_the_host_fetches_only_when_it_logs(tmp_path, monkeypatch):
    fetched, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or device_get(tree))
    tracker = Tracker(tmp_path, "sft", 3, tensorboard=False)
    for k in (1, 2):
        tracker.update(k, {"loss": mean(k, 1)}, log=False)
    assert fetched == []
    assert tracker.update(3, {"loss": mean(3, 1)}, log=True)["loss"] == 2.0
    assert len(fetched) == 1
    tracker.close()


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    tracker.write(3, {"eval/accuracy": np.float32(0.5), "n": 2})
    assert lines(tmp_path) == [{"step": 3, "eval/accuracy": 0.5, "n": 2.0}]
    tracker.close()


@pytest.mark.parametrize(
    "tail",
    ["", '{"step": 7, "loss"', '{"step": 3, "lo', "{", '{"loss": 1.0}\n', "\x00\x00", '{"step": 3, "loss": 1.5}'],
    ids=["whole", "cut later", "cut earlier", "brace", "no step", "zeros", "no line end"],
)
@pytest.mark.parametrize(("start", "kept"), [(4, [2, 4]), (3, [2]), (0, []), (99, [2, 4, 6])])
def test_a_resumed_run_drops_later_and_half_written_lines(tmp_path, start, kept, tail):
    before = "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in (2, 4, 6))
    (tmp_path / "metrics.jsonl").write_text(before + tail, encoding="utf-8")
    tracker = Tracker(tmp_path, "sft", 200, tensorboard=False, start_step=start)
    assert [line["step"] for line in lines(tmp_path)] == kept
    tracker.update(start + 1, {"loss": mean(5, 1)}, log=True)
    tracker.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [*((k, k / 2) for k in kept), (start + 1, 5.0)]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    tracker = Tracker(tmp_path, "sft", 2, tensorboard=True)
    tracker.write(1, {"loss": 0.25})
    tracker.write(2, {"loss": 0.125})
    tracker.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, scalars = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")  # length, its checksum, record, the record's checksum
        event = Event.FromString(content[12 : 12 + size])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    assert scalars == [("sft/loss", 1, 0.25), ("sft/loss", 2, 0.125)]


def test_without_tensorboard_no_folder_is_made(tmp_path):
    Tracker(tmp_path, "sft", 2, tensorboard=False).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_step_is_one_flushed_line_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    """As another program reads them; the first step compiled, and what is untimed takes no part of the others."""
    clock = iter([100.0, 110.0, 110.0, 130.0, 130.5, 131.0])
    monkeypatch.setattr("mpo_jax.training.tracker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tracker = Tracker(tmp_path, "sft", 3, tensorboard=False, every_step=True)
    flushed = []
    for k in (1, 2, 3):
        if k == 2:
            with tracker.untimed():
                pass
        tracker.update(k, {"loss": mean(1.23456789, 1) if k < 3 else mean(0, 0), "tokens": 100}, log=True)
        flushed.append(capsys.readouterr().out)
    tracker.close()
    assert flushed == [
        "sft step 1 loss 1.234568 compile_s 10.000\n",
        "sft step 2 loss 1.234568 step_time_s 0.5 tokens_per_s 200\n",
        "sft step 3 loss nan step_time_s 0.5 tokens_per_s 200\n",
    ]


def test_the_line_of_a_ppo_step_has_the_policy_s_loss():
    values = {"loss/policy_avg": -0.25, "loss/value_avg": 0.5, "objective/scores": 1, "objective/kl": 2e-9, "other": 3}
    assert step_line("ppo", 12, values) == "ppo step 12 loss -0.25 value_loss 0.5 score 1 kl 2e-09"


def test_a_plain_terminal_gets_the_last_step(tmp_path, capsys):
    tracker = Tracker(tmp_path, "sft", 3, tensorboard=False)
    for k in (1, 2, 3):
        tracker.update(k, {"loss": mean(k, 1), "grad_norm": 1.0}, log=True)
    tracker.close()
    printed = capsys.readouterr().out
    assert "sft 3/3" in printed and "loss 3" in printed
    assert "sft 1/3" not in printed
