"""The compilation cache after kills: no entry is half there, and a damaged one is replaced without a warning."""

import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

from mpo_jax.config.schema import RuntimeConfig
from mpo_jax.runtime import machine
from mpo_jax.runtime.program_cache import ABANDONED_S, WholeEntries

COMPILE = """
import resource, signal, sys
import jax
from mpo_jax.runtime import program_cache
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.removeprefix("/jax/compilation_cache/")))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
program_cache.use(sys.argv[1])
x = jax.numpy.ones(3)
if len(sys.argv) > 2:
    # the kernel kills a process whose file grows beyond the limit, in mid-write
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
events.clear()
jax.jit(lambda x: jax.numpy.sort(x) @ x)(x)
print(events.count("cache_hits"), events.count("cache_misses"))
"""
SEVERAL = """
import sys
from pathlib import Path
import jax
from jax.sharding import NamedSharding, PartitionSpec
from mpo_jax.runtime import program_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: event.endswith("cache_hits") and hits.append(event))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
program_cache.use(sys.argv[1])
if len(sys.argv) > 2:
    program_cache.compilation_cache.put_executable_and_time = program_cache._write
devices = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
x = jax.device_put(jax.numpy.arange(4.0), devices)
jax.jit(lambda x: x.sum())(x)
def one(x): return jax.numpy.sort(x) @ x
jax.jit(one)(jax.numpy.ones(3))
print(len(hits), sorted({entry.name.split("-")[0] for entry in Path(sys.argv[1]).glob("*-cache")}))
"""
ENTRY = zlib.compress(os.urandom(4096))


def compiled(folder: Path, *limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", COMPILE, str(folder), *map(str, limit)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_process_killed_in_mid_write_leaves_no_entry(tmp_path):
    killed = compiled(tmp_path, 500)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert [file.stat().st_size for file in tmp_path.glob(".*.tmp")] == [500], "it was killed in mid-write"
    later = [compiled(tmp_path) for _ in range(2)]
    assert [run.returncode for run in later] == [0, 0], later[0].stderr + later[1].stderr
    assert [run.stdout.split() for run in later] == [["0", "1"], ["1", "0"]], "compiled once, and then found"


@pytest.mark.parametrize("written", [False, True], ids=["by none", "by JAX itself"])
def test_programs_of_several_simulated_devices_are_neither_kept_nor_read(tmp_path, written):
    """Read from a cache, their devices may wait in different collectives: one in a loop, another beside it."""

    def run(*more: str) -> list[str]:
        command = [sys.executable, "-W", "error", "-c", SEVERAL, str(tmp_path), *more]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(maxsplit=1)

    hits, kept = run(*(["JAX"] if written else []))
    assert hits == "0" and "jit_one" in kept and ("jit__lambda" in kept) == written
    entries = {entry.name for entry in tmp_path.glob("*-cache")}
    hits, _ = run()
    assert {entry.name for entry in tmp_path.glob("*-cache")} == entries
    assert int(hits) == len([name for name in entries if not name.startswith("jit__lambda")])


@pytest.mark.parametrize("max_size", [-1, 10**6], ids=["unbounded", "evicting"])
@pytest.mark.parametrize("length", [0, 1, len(ENTRY) // 2, len(ENTRY) - 1])
def test_a_damaged_entry_is_absent_and_is_replaced(tmp_path, length, max_size):
    cache = WholeEntries(str(tmp_path), max_size=max_size)
    cache.put("key", ENTRY)
    assert cache.get("key") == ENTRY
    os.truncate(tmp_path / "key-cache", length)
    assert cache.get("key") is None
    cache.put("key", ENTRY)
    assert cache.get("key") == ENTRY


def test_jax_s_own_entries_are_read_and_its_caches_read_ours(tmp_path):
    plain, whole = (cache(str(tmp_path), max_size=-1) for cache in (WholeEntries.__base__, WholeEntries))
    plain.put("theirs", ENTRY)
    whole.put("ours", ENTRY)
    assert whole.get("theirs") == plain.get("ours") == ENTRY


def test_readers_see_whole_entries_while_others_write(tmp_path):
    """Four threads write one key, as processes that start together do."""
    size, sizes = 1 << 22, set()
    entry, over = tmp_path / "key-cache", threading.Event()
    cache = WholeEntries(str(tmp_path), max_size=-1)

    def write(byte: int) -> None:
        for _ in range(10):
            cache.put("key", bytes([byte]) * size)

    def read() -> None:
        while not over.is_set():
            if entry.exists():
                value = entry.read_bytes()
                sizes.add((len(value), len(set(value))))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(byte,)) for byte in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    assert sizes == {(size, 1)}
    assert list(tmp_path.iterdir()) == [entry]


def test_what_killed_processes_left_goes_after_a_day(tmp_path):
    old, new = tmp_path / ".0.tmp", tmp_path / ".1.tmp"
    for file in (old, new):
        file.write_bytes(ENTRY[:100])
    then = time.time() - ABANDONED_S - 60
    os.utime(old, (then, then))
    WholeEntries(str(tmp_path), max_size=-1).put("key", ENTRY)
    assert not old.exists() and new.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        WholeEntries(str(tmp_path), max_size=-1).put("key", ENTRY)
    assert not list(tmp_path.iterdir())


def test_this_process_s_own_cache_has_whole_entries():
    """Of the test suite, and so of every command that it runs: JAX makes the cache of the class that `use` has set."""
    made = compilation_cache.get_file_cache(str(jax.config.jax_compilation_cache_dir))
    assert made is not None and isinstance(made[0], WholeEntries)


@pytest.mark.parametrize(
    "given,wanted,kind",
    [
        ("gs://bucket/programs", "gs://bucket/programs", LRUCache),
        ("~/programs", str(Path("~/programs").expanduser()), WholeEntries),
        ("programs", "programs", WholeEntries),
    ],
)
def test_an_address_is_left_to_jax_s_own_cache(given, wanted, kind, monkeypatch):
    """And stays as it is: a path would make one slash of two."""
    for name in ("LRUCache", "get_executable_and_time", "put_executable_and_time"):
        monkeypatch.setattr(compilation_cache, name, getattr(compilation_cache, name))
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(jax.config, "update", lambda key, value: told.append((key, value)))
    machine.start(RuntimeConfig(compilation_cache=given))
    assert ("jax_compilation_cache_dir", wanted) in told and compilation_cache.LRUCache is kind
