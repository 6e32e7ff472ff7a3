"""mpo_jax.runtime.file_digests: a file is read once while it does not change, in this process and in later ones."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpo_jax.config.schema import DataConfig
from mpo_jax.data.base_model import fingerprint_model
from mpo_jax.data.corpus import fingerprint
from mpo_jax.runtime import file_digests
from mpo_jax.runtime.file_digests import file_digest
from tests.models.tiny import RECORDED


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are read; the files of these tests count as old."""
    names, read = [], hashlib.file_digest

    def noted(file, kind):
        names.append(Path(file.name).name)
        return read(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    monkeypatch.setattr(file_digests, "SETTLED_NS", 0)
    file_digests._known.clear()
    yield names
    file_digests._known.clear()


def as_another_process() -> None:
    file_digests._known.clear()


def write(path: Path, text: str) -> str:
    if path.exists():
        time.sleep(0.02)  # longer than a step of the file system's clock
    path.write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_is_read_once(tmp_path, reads):
    path, cache = tmp_path / "a", tmp_path / "cache"
    expected = write(path, "one")
    for _ in range(2):
        assert file_digest(path, cache) == expected
        as_another_process()
    assert file_digest(path) == expected, "without a cache on disk"
    assert file_digest(path) == expected
    assert reads == ["a", "a"]


def test_a_changed_file_is_read_again(tmp_path, reads):
    """Its bytes, keeping length and time; its place, by a rename; its target, where it is a link."""
    path, cache = tmp_path / "a", tmp_path / "cache"
    write(path, "one")
    file_digest(path, cache)
    times = path.stat()
    expected = write(path, "two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path, cache) == expected
    expected = write(tmp_path / "b", "six")
    os.replace(tmp_path / "b", path)
    assert file_digest(path, cache) == expected
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_digest(link, cache) == expected and len(reads) == 3, "as in a hub's snapshot"
    link.unlink()
    expected = write(tmp_path / "c", "ten")
    link.symlink_to(tmp_path / "c")
    assert file_digest(link, cache) == expected


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"state": 3}', '{"state": [], "sha256": "00"}', "\x00\xff"])
def test_a_damaged_entry_is_a_miss_and_is_written_again(tmp_path, reads, damage):
    path, cache = tmp_path / "a", tmp_path / "cache"
    expected = write(path, "one")
    file_digest(path, cache)
    (entry,) = cache.iterdir()
    sound = entry.read_text()
    entry.write_text(damage, encoding="latin-1")
    as_another_process()
    assert file_digest(path, cache) == expected and entry.read_text() == sound and len(reads) == 2
    entry.write_text(json.dumps({**json.loads(sound), "sha256": "no digits"}))
    as_another_process()
    assert file_digest(path, cache) == expected


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, reads):
    path, cache = tmp_path / "a", tmp_path / "file" / "cache"
    expected = write(path, "one")
    write(tmp_path / "file", "no folder")
    assert file_digest(path, cache) == expected == file_digest(path, cache)
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "absent", cache)


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, reads, monkeypatch):
    """It may be written again within the file system's clock."""
    monkeypatch.setattr(file_digests, "SETTLED_NS", 10**12)
    path, cache = tmp_path / "a", tmp_path / "cache"
    write(path, "one")
    assert file_digest(path, cache) == file_digest(path, cache) and len(reads) == 2 and not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, reads, monkeypatch):
    path, cache = tmp_path / "a", tmp_path / "cache"
    write(path, "one")
    read = hashlib.file_digest

    def slow(file, kind):
        found = read(file, kind)
        time.sleep(0.01)
        write(path, "two and more")
        return found

    monkeypatch.setattr(hashlib, "file_digest", slow)
    file_digest(path, cache)
    monkeypatch.setattr(hashlib, "file_digest", read)
    assert file_digest(path, cache) == hashlib.sha256(b"two and more").hexdigest()


def test_many_may_write_one_entry(tmp_path, reads):
    path, cache = tmp_path / "a", tmp_path / "cache"
    expected = write(path, "one")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: file_digest(path, cache), range(32))) == {expected}
    assert len(list(cache.iterdir())) == 1, "no temporary file is left"


def test_names_do_not_depend_on_the_cache(tmp_path, reads):
    """Cold, warm and none: of a model's files and of the rows'."""
    model, rows, cache = str(RECORDED / "qwen2_score"), tmp_path / "rows.jsonl", tmp_path / "cache"
    write(rows, '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    data = DataConfig(kind="pairs", path=(str(rows),))
    for make in (lambda cache: fingerprint_model(model, cache), lambda cache: fingerprint(data, cache)):
        names = set()
        for folder in (None, cache, cache):
            as_another_process()
            before = len(reads)
            names.add(make(folder))
        assert len(names) == 1 and len(reads) == before, "the last time nothing was read"
