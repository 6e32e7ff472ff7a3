"""mpo_jax.runtime.files: files of another host are waited for until they are whole."""

import threading
import time

import pytest

from mpo_jax.errors import UserError
from mpo_jax.runtime import files
from mpo_jax.runtime.files import wait_for_files


def test_a_file_that_appears_late_and_grows_is_waited_for(tmp_path):
    folder = tmp_path / "stage"

    def publish() -> None:
        time.sleep(0.3)
        (folder / "model").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "model" / "weights").write_bytes(b"12")
        time.sleep(0.3)
        (folder / "model" / "weights").write_bytes(b"1234")

    begin, thread = time.monotonic(), threading.Thread(target=publish)
    thread.start()
    wait_for_files(folder, {"manifest.json": 2, "model/weights": 4})
    assert time.monotonic() - begin > 0.5 and (folder / "model" / "weights").read_bytes() == b"1234"
    thread.join()


def test_the_folder_is_read_again_for_a_client_that_remembers(tmp_path, monkeypatch):
    """An NFS client answers from memory that a file is missing, until something reads its folder."""
    (tmp_path / "a").write_text("1")
    real, read = files._size, []
    monkeypatch.setattr(files, "_size", lambda path: real(path) if read else None)
    monkeypatch.setattr(files.os, "listdir", lambda folder: read.append(folder))
    wait_for_files(tmp_path, {"a": 1})
    assert tmp_path in read


@pytest.mark.parametrize(
    ("content", "seen"), [(None, "is not there"), (b"12", "has 2 of 4 bytes")], ids=["absent", "short"]
)
def test_a_file_that_never_comes_is_an_error(tmp_path, content, seen):
    if content is not None:
        (tmp_path / "b").write_bytes(content)
    (tmp_path / "a").write_bytes(b"1")
    message = rf"b {seen} on .* after process 0 wrote it \(1 of 2 files are missing\).* or runtime\.bucket"
    with pytest.raises(UserError, match=message):
        wait_for_files(tmp_path, {"a": 1, "b": 4}, timeout_s=0.3)


def test_files_that_are_there_cost_no_time(tmp_path):
    (tmp_path / "a").touch()
    begin = time.monotonic()
    wait_for_files(tmp_path, {"a": 0})
    wait_for_files(tmp_path / "absent", {})
    assert time.monotonic() - begin < 0.15
