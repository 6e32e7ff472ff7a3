"""mpo_jax.tracker: exact averages, one JSON line a logged step, and a file that a resumed run continues cleanly."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.tracker import Tracker, summarise
from mpo_jax.types import Mean


def mean(total: float, count: float) -> Mean:
    return Mean(jnp.float32(total), jnp.float32(count))


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_means_are_added_before_dividing():
    """(1 + 6) / (1 + 3), where the mean of the means would be 1.5."""
    steps = [{"loss": mean(1, 1), "norm": 1.0}, {"loss": mean(6, 3), "norm": np.float32(4.0)}]
    assert summarise(steps) == {"loss": 1.75, "norm": 2.5}
    assert summarise([{"loss": mean(0, 0)}, {"loss": mean(0, 0)}]) == {"loss": 0.0}
    assert summarise([{"loss": mean(3, 0)}, {"loss": mean(-1, 2)}]) == {"loss": 1.0}


def test_sums_are_taken_in_float64():
    """A float32 sum of these would lose every 1."""
    assert summarise([{"loss": mean(2.0**25, 0)}, *[{"loss": mean(1, 0.5)}] * 4])["loss"] == (2.0**25 + 4) / 2


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
    assert all(line["timing_s/step"] > 0 for line in written)
    assert all(type(value) is float for name, value in results[4].items())


def test_time_is_told_per_step_and_tokens_as_a_rate(tmp_path, monkeypatch):
    """Made at 100 s, logged at 101 s and 105 s: one step of 1 s, then two of 2 s with 650 tokens on average."""
    clock = iter([100.0, 101.0, 105.0])
    monkeypatch.setattr("mpo_jax.tracker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tracker = Tracker(tmp_path, "sft", 9, tensorboard=False)
    results = [tracker.update(k, {"tokens": jnp.float32(100 * k * k)}, log=k != 2) for k in (1, 2, 3)]
    tracker.close()
    assert results == [
        {"timing_s/step": 1.0, "perf/tokens_per_s": 100.0},
        None,
        {"timing_s/step": 2.0, "perf/tokens_per_s": 325.0},
    ]


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
    ["", '{"step": 7, "loss"', '{"step": 3, "lo', "{", '{"loss": 1.0}\n', "\x00\x00"],
    ids=["whole", "cut later", "cut earlier", "brace", "no step", "zeros"],
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


def test_a_plain_terminal_gets_the_last_step(tmp_path, capsys):
    tracker = Tracker(tmp_path, "sft", 3, tensorboard=False)
    for k in (1, 2, 3):
        tracker.update(k, {"loss": mean(k, 1), "grad_norm": 1.0}, log=True)
    tracker.close()
    printed = capsys.readouterr().out
    assert "sft 3/3" in printed and "loss 3" in printed
    assert "sft 1/3" not in printed
