"""mpo_jax.runtime.parts and .passes: what is kept of a pass, what is not believed, and how a signal stops it."""

import json
import signal
import threading

import numpy as np
import pytest

from mpo_jax.errors import PassPreempted, Preempted
from mpo_jax.runtime.parts import MANIFEST, Parts
from mpo_jax.runtime.passes import Pass
from mpo_jax.runtime.preemption import stopping_at

IDENTITY = {"pass": "scores", "rows": 10, "examples": "ab"}


def entry(number: int) -> dict[str, np.ndarray]:
    """Arrays of every type and shape that a pass keeps, no two entries alike."""
    return {
        "batch": np.asarray(number),
        "ids": np.arange(number, dtype=np.int32),
        "score": np.full((2, 3), number / 3, np.float32),
        "has_eos": np.asarray([number % 2 == 0]),
        "count": np.asarray([[np.pi * number]]),
    }


def same(found, numbers) -> None:
    assert [int(one["batch"]) for one in found] == list(numbers)
    for one, number in zip(found, numbers, strict=True):
        assert one.keys() == entry(number).keys()
        for name, value in entry(number).items():
            assert one[name].dtype == value.dtype and one[name].shape == value.shape
            np.testing.assert_array_equal(one[name], value)


def fill(folder, numbers, identity=IDENTITY, **options) -> Parts:
    parts = Parts(folder, identity, **{"minutes": 0, **options})
    for number in numbers:
        parts.add(entry(number), rows=2)
    parts.flush()
    parts.close()
    return parts


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_entries_come_back_bit_for_bit_in_their_order(tmp_path):
    assert fill(tmp_path / "p", [3, 1]).entries == []
    again = fill(tmp_path / "p", [0, 12])
    same(again.entries, [3, 1])
    assert again.rows == 4
    same(fill(tmp_path / "p", []).entries, [3, 1, 0, 12])
    assert names(tmp_path / "p") == [*(f"0000{n}.safetensors" for n in range(4)), MANIFEST]


def test_entries_between_two_savings_share_a_part(tmp_path):
    parts = Parts(tmp_path, IDENTITY, minutes=60)
    for number in range(12):
        parts.add(entry(number), rows=1)
    assert names(tmp_path) == [], "an hour has not passed"
    parts.flush()
    parts.close()
    assert names(tmp_path) == ["00000.safetensors", MANIFEST]
    same(fill(tmp_path, []).entries, range(12))


def test_what_was_not_written_is_lost_and_nothing_else(tmp_path):
    fill(tmp_path, [1, 2])
    parts = Parts(tmp_path, IDENTITY, minutes=60)
    parts.add(entry(3), rows=1)
    parts.close()
    same(fill(tmp_path, []).entries, [1, 2])


def torn(path):
    path.write_bytes(path.read_bytes()[:-3])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "why"),
    [(torn, "is damaged"), (flipped, "is damaged"), (lambda path: path.unlink(), "is missing")],
)
def test_a_broken_part_is_named_and_dropped_with_its_rows_alone(tmp_path, capsys, damage, why):
    fill(tmp_path, [1, 2, 3])
    damage(tmp_path / "00001.safetensors")
    again = fill(tmp_path, [4])
    same(again.entries, [1, 3])
    assert again.rows == 4
    said = capsys.readouterr().out.replace("\n", "")
    assert f"00001.safetensors {why}; its rows are made again" in said and said.count("made again") == 1
    same(fill(tmp_path, []).entries, [1, 3, 4])
    assert "made again" not in capsys.readouterr().out


def test_a_part_that_the_manifest_does_not_name_is_dropped(tmp_path, capsys):
    """A kill came between the part and the manifest, or while a file was half-written."""
    fill(tmp_path, [1])
    (tmp_path / "00001.safetensors").write_bytes((tmp_path / "00000.safetensors").read_bytes())
    (tmp_path / ".00002.safetensors.tmp").write_bytes(b"half")
    same(fill(tmp_path, [2]).entries, [1])
    assert "00001.safetensors is not in the manifest; its rows are made again" in capsys.readouterr().out
    same(fill(tmp_path, []).entries, [1, 2])
    assert names(tmp_path) == ["00000.safetensors", "00001.safetensors", MANIFEST]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"parts": []}'])
def test_without_a_readable_manifest_everything_is_made_again(tmp_path, capsys, text):
    fill(tmp_path, [1])
    (tmp_path / MANIFEST).write_text(text)
    assert fill(tmp_path, []).entries == []
    said = capsys.readouterr().out
    assert f"{MANIFEST} is damaged" in said and "00000.safetensors is not in the manifest" in said


def test_parts_of_another_pass_are_dropped_with_a_word_on_what_differs(tmp_path, capsys):
    fill(tmp_path, [1])
    other = fill(tmp_path, [5], identity={**IDENTITY, "examples": "cd", "model": "x"})
    assert other.entries == [] and other.rows == 0
    assert "results of other examples, model are dropped" in capsys.readouterr().out.replace("\n", " ")
    assert fill(tmp_path, []).entries == [], "the other pass has replaced the first"


def test_new_files_are_sent_once_after_they_are_in_the_manifest(tmp_path):
    sent = []

    def send(folder, files):
        named = [part["file"] for part in json.loads((folder / MANIFEST).read_text())["parts"]]
        sent.append(([path.name for path in files], named))

    fill(tmp_path, [1], send=send)
    fill(tmp_path, [2, 3], send=send)
    files = [f"0000{n}.safetensors" for n in range(3)]
    assert sent == [([files[n]], files[: n + 1]) for n in range(3)]


def test_an_error_in_writing_is_raised(tmp_path):
    """Writing has a thread of its own, whose errors must not be lost there."""

    def send(folder, files):
        raise OSError("no bucket")

    parts = Parts(tmp_path, IDENTITY, minutes=0, send=send)
    parts.add(entry(1), rows=1)
    with pytest.raises(OSError, match="no bucket"):
        parts.flush()
    parts.close()


# ---- passes --------------------------------------------------------------------------------------------------------


def running(folder, *, total=10, every=1, minutes=60.0) -> Pass:
    return Pass("select's scores", total, Parts(folder, IDENTITY, minutes=minutes), every=every)


@pytest.mark.parametrize(("done", "reported"), [(0, 0), (2, 0), (6, 4), (8, 8), (10, 10)])
def test_reports_of_whole_groups_stay_valid(tmp_path, done, reported):
    fill(tmp_path, range(done // 2))
    with running(tmp_path, every=4) as keep:
        assert (keep.done, keep.reported) == (done, reported)


def test_a_finished_pass_has_all_its_rows_on_disk(tmp_path):
    with running(tmp_path) as keep:
        keep.add(entry(1), rows=4)
        keep.check()
    same(list(running(tmp_path).earlier()), [1])


def test_a_pass_that_fails_leaves_what_was_saved(tmp_path):
    fill(tmp_path, [1])
    with pytest.raises(ValueError, match="broken"), running(tmp_path) as keep:
        keep.add(entry(2), rows=2)
        raise ValueError("broken")
    same(list(running(tmp_path).earlier()), [1])


def test_sigterm_stops_at_the_next_check_with_all_rows_on_disk(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    said = r"after 3 of 10 rows of select's scores, which are saved; the same command goes on"
    with pytest.raises(PassPreempted, match=said), running(tmp_path) as keep:
        keep.add(entry(1), rows=2)
        keep.check()
        signal.raise_signal(signal.SIGTERM)
        keep.add(entry(2), rows=1)
        keep.check()
        pytest.fail("it must have stopped")
    assert signal.getsignal(signal.SIGTERM) == before
    same(list(running(tmp_path).earlier()), [1, 2])
    assert issubclass(PassPreempted, Preempted)


def test_a_step_of_training_to_stop_at_is_none_of_a_pass(tmp_path):
    """`mpo verify` trains up to a step, after the passes that training needs."""
    with stopping_at(1), running(tmp_path) as keep:
        keep.check()


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    with running(tmp_path, minutes=0) as keep:
        keep.add(entry(1), rows=1)
    assert threading.active_count() == before
