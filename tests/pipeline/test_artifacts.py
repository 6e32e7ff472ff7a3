"""mpo_jax.pipeline.artifacts: built once, named by content, never half-finished, safe for runs side by side."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from mpo_jax import __version__
from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import Config, RuntimeConfig
from mpo_jax.errors import UserError
from mpo_jax.pipeline import artifacts
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.recipe import FORMAT, RECIPE, artifact_name, make_recipe
from mpo_jax.runtime.coordination import Coordination
from mpo_jax.runtime.files import write_json
from tests.runtime.stores import Shared, together


def writer(text: str, calls: list | None = None, summary: dict | None = None):
    """A stage that writes one file and notes that it ran."""

    def run(folder):
        if calls is not None:
            calls.append(text)
        (folder / "result.txt").write_text(text)
        return summary or {}

    return run


def recipe(stage="sft", settings=None, parents=None, inputs=None):
    """What a stage is made from, without inputs unless they are given."""
    return make_recipe(stage, settings or {}, inputs or {}, parents or {})


def visible(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if not path.name.startswith("."))


def test_a_stage_is_built_once_and_reused(tmp_path):
    calls = []
    store = Store(tmp_path)
    first = store.build(recipe("sft", {"lr": 0.1}), writer("a", calls))
    second = store.build(recipe("sft", {"lr": 0.1}), writer("b", calls))
    later = Store(tmp_path)
    third = later.build(recipe("sft", {"lr": 0.1}), writer("c", calls))
    assert first == second == third
    assert (first.path / "result.txt").read_text() == "a"
    later.build(recipe("sft", {"lr": 0.1}), writer("d", calls))
    assert first.id.startswith("sft-") and visible(store) == [first.id]
    # each is told once, and what a store made itself is not called reused
    assert (store.made, store.reused, later.made, later.reused) == ([first.id], [], [], [first.id])
    assert calls == ["a"]


def test_the_id_depends_on_stage_settings_inputs_and_parents_alone(tmp_path):
    store = Store(tmp_path)
    base = store.build(recipe("sft", {"lr": 0.1, "steps": 3}), writer("base"))
    other = store.build(recipe("sft", {"lr": 0.2, "steps": 3}), writer("other"))

    def id_of(stage="dpo", settings=None, parents=None, inputs=None):
        made = recipe(stage, settings or {"beta": 0.1}, parents or {"init": base}, inputs or {"data": "d1"})
        return store.build(made, writer("x")).id

    ids = [
        id_of(), id_of(stage="ppo"), id_of(settings={"beta": 0.2}), id_of(settings={"beta": 0.1, "more": None}),
        id_of(parents={"init": other}), id_of(parents={"reference": base}),
        id_of(inputs={"data": "d2"}), id_of(inputs={"base": "d1"}), id_of(inputs={"data": "d1", "base": "b"}),
        id_of(parents={"init": base, "reference": base}), id_of(parents={"init": base, "reference": other}),
    ]  # fmt: skip
    assert len(set(ids)) == len(ids)
    assert id_of() == ids[0]
    swapped = {"reference": other, "init": base}
    assert id_of(parents=swapped) == ids[-1]
    assert store.build(recipe("sft", {"steps": 3, "lr": 0.1}), writer("x")).id == base.id
    assert Store(tmp_path / "elsewhere").build(recipe("sft", {"lr": 0.1, "steps": 3}), writer("x")).id == base.id


def test_another_format_is_not_reused(tmp_path, monkeypatch):
    before = Store(tmp_path).build(recipe(), writer("x")).id
    monkeypatch.setattr("mpo_jax.pipeline.recipe.FORMAT", FORMAT + 1)
    assert Store(tmp_path).build(recipe(), writer("x")).id != before


def test_the_manifest_tells_what_made_it(tmp_path):
    store = Store(tmp_path)
    sft = store.build(recipe("sft", {"lr": 0.1}), writer("x"))
    made_from = recipe("dpo", {"beta": 0.0}, {"init": sft}, {"data": "d"})
    dpo = store.build(made_from, writer("x", summary={"loss": 0.5, "name": "ü"}))
    manifest = json.loads((dpo.path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == dpo.manifest
    seconds = manifest.pop("seconds")
    assert 0 <= seconds < 60
    assert manifest == {
        "format": FORMAT, "stage": "dpo", "settings": {"beta": 0.0}, "inputs": {"data": "d"},
        "parents": {"init": sft.id}, "version": __version__, "warnings": [], "summary": {"loss": 0.5, "name": "ü"},
    }  # fmt: skip
    assert dpo.path == tmp_path / "stages" / dpo.id
    assert dpo.model == dpo.path / "model"


def test_a_run_that_fails_leaves_nothing_finished_and_is_resumed(tmp_path):
    store = Store(tmp_path)

    def fails(folder):
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "1").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.build(recipe(), fails)
    assert visible(store) == [] == store.made

    def resumes(folder):
        assert (folder / "checkpoints" / "1").read_text() == "half"
        (folder / "result.txt").write_text("whole")
        return {}

    made = Store(tmp_path).build(recipe(), resumes)
    assert visible(store) == [made.id]
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "result.txt"]  # no checkpoints
    assert not list(store.folder.glob(".*.partial"))


def test_a_stage_took_as_long_as_all_attempts_at_it(tmp_path):
    """Each from its beginning to the last that it wrote; not the days between."""

    def stops(after: float):
        def run(folder):
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "checkpoints" / "state").write_text("saved")
            begun = (folder / RECIPE).stat().st_mtime
            os.utime(folder / "checkpoints" / "state", (begun + after, begun + after))
            raise RuntimeError("killed")

        return run

    for seconds in (100.0, 1000.0):
        with pytest.raises(RuntimeError, match="killed"):
            Store(tmp_path).build(recipe(), stops(seconds))
    made = Store(tmp_path).build(recipe(), writer("x"))
    assert 1100 <= made.manifest["seconds"] < 1130 and "seconds_before" not in made.manifest
    # nothing of a file that says nonsense
    (partial := tmp_path / "stages" / ".dpo-0123456789ab.partial").mkdir()
    for text in ("{", "[]", *(f'{{"seconds_before": {value}}}' for value in ('"long"', -5, "null", "NaN", 1e99))):
        (partial / RECIPE).write_text(text)
        assert artifacts._seconds_before(partial) == 0.0


def test_a_folder_says_from_the_start_what_is_made_in_it(tmp_path):
    """`mpo verify` and a resumed run read it there; the manifest says it afterwards."""
    store, found = Store(tmp_path), {}
    parent = store.build(recipe("sft", {"lr": 0.1}), writer("x"))

    def run(folder):
        found.update(json.loads((folder / RECIPE).read_text()))
        return {}

    made = store.build(recipe("dpo", {"beta": 0.5}, {"init": parent}, {"data": "d"}), run)
    assert found == {
        "format": FORMAT, "stage": "dpo", "settings": {"beta": 0.5}, "inputs": {"data": "d"},
        "parents": {"init": parent.id},
    }  # fmt: skip
    assert found.items() <= made.manifest.items() and not (made.path / RECIPE).exists()


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_stay_where_the_stage_s_configuration_says_so(tmp_path, keep):
    def run(folder):
        (folder / "checkpoints" / "1").mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(Config(runtime=RuntimeConfig(keep_finished_checkpoints=keep))))
        return {}

    made = Store(tmp_path).build(recipe(), run)
    assert (made.path / "checkpoints" / "1").is_dir() == keep


def test_another_recipe_does_not_resume_a_foreign_folder(tmp_path):
    store = Store(tmp_path)

    def fails(folder):
        (folder / "left.txt").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.build(recipe("sft", {"lr": 0.1}), fails)
    assert not (store.build(recipe("sft", {"lr": 0.2}), writer("x")).path / "left.txt").exists()


def test_threads_that_want_the_same_stage_run_it_once(tmp_path):
    calls, made = [], []
    barrier = threading.Barrier(4)

    def build():
        store = Store(tmp_path)
        barrier.wait()

        def run(folder):
            calls.append(threading.get_ident())
            time.sleep(0.2)
            return {}

        made.append(store.build(recipe("sft", {"lr": 0.1}), run).id)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(made) == 4 and len(set(made)) == 1


PROGRAM = """
import sys, time
from pathlib import Path
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.recipe import make_recipe

def run(folder):
    with open(sys.argv[1] + "/calls", "a") as file:
        file.write("x")
    time.sleep(1.0)
    return {}

Path(sys.argv[1], "ready-" + sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    time.sleep(0.01)
store = Store(Path(sys.argv[1]))
print(store.build(make_recipe("sft", {"lr": 0.1}, {}, {}), run).id, len(store.made), len(store.reused))
"""


def test_processes_that_want_the_same_stage_run_it_once(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    running = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    last = [process.communicate(timeout=120)[0].splitlines()[-1].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"
    assert last[0][0] == last[1][0]
    assert sorted(line[1:] for line in last) == [["0", "1"], ["1", "0"]]


def several(monkeypatch, count: int, process) -> None:
    """`process(index)` in a thread for each of several processes, which take one another for hosts."""
    local = threading.local()

    def run(one: Coordination, index: int) -> None:
        local.one, local.index = one, index
        process(index)

    monkeypatch.setattr(artifacts, "is_main", lambda: local.index == 0)
    monkeypatch.setattr(artifacts, "wait", lambda name: local.one.wait(name))
    monkeypatch.setattr(artifacts, "agree", lambda value, name: local.one.agree(value, name))
    together(Shared(), count, run)


def test_hosts_wait_for_the_lock_of_another_run_together(tmp_path, monkeypatch, capsys):
    """Nothing limits the wait, and no collective is begun meanwhile: the device barriers would raise here."""
    forbidden = lambda *_, **__: pytest.fail("a collective on the devices")  # noqa: E731
    for name in ("sync_global_devices", "broadcast_one_to_all", "process_allgather"):
        monkeypatch.setattr(f"jax.experimental.multihost_utils.{name}", forbidden)
    monkeypatch.setattr(artifacts, "LOCK_POLL_S", 0.05)
    calls, made = [], {}
    other = FileLock(tmp_path / "stages" / f".{artifact_name(recipe())}.lock", thread_local=False)
    Store(tmp_path)
    other.acquire()
    timer = threading.Timer(1.5, other.release)
    timer.start()
    begin = time.monotonic()

    def process(index: int) -> None:
        made[index] = Store(tmp_path).build(recipe(), writer("x", calls if index else None)).id

    several(monkeypatch, 3, process)
    timer.join()
    assert len(set(made.values())) == 1 and calls == ["x", "x"] and time.monotonic() - begin >= 1.5
    assert f"waiting for {made[0]}, which another run is making" in capsys.readouterr().out


def test_a_host_waits_until_it_sees_what_process_0_has_published(tmp_path, monkeypatch):
    """Process 1 has a folder of its own that follows process 0's after a while, as on a network file system."""
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    for folder in (slow, fast):
        (folder / "stages").mkdir(parents=True)
    seen = {}

    def follow() -> None:
        """Copies a folder to the slower host's once it has been there for a while."""
        shown: dict[str, float] = {}
        while not stop.is_set():
            for path in sorted(fast.rglob("*")):
                place = slow / path.relative_to(fast)
                if path.suffix != ".lock" and time.monotonic() - shown.setdefault(str(path), time.monotonic()) > 0.4:
                    if path.is_dir():
                        place.mkdir(exist_ok=True)
                    elif not place.exists() and place.parent.is_dir():
                        place.write_bytes(path.read_bytes())
            time.sleep(0.05)

    def run(folder):
        assert (folder / RECIPE).is_file(), "begun here, too"
        if folder.is_relative_to(fast):
            (folder / "model").mkdir()
            (folder / "model" / "weights").write_bytes(bytes(100))
        return {}

    def process(index: int) -> None:
        store = Store(slow if index else fast)
        made = store.build(recipe("sft"), run)
        seen[index] = (made.path / "model" / "weights").read_bytes(), made.manifest
        # again, as a parent of the next stage and in a later run
        assert store.build(recipe("sft"), run) == made

    stop = threading.Event()
    thread = threading.Thread(target=follow)
    thread.start()
    try:
        several(monkeypatch, 2, process)
    finally:
        stop.set()
        thread.join()
    assert seen[0] == seen[1] and len(seen[1][0]) == 100


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to workdir .*file: Not a directory; .*workdir=DIR"):
        Store(tmp_path / "file")
    if os.geteuid() == 0:  # root writes everywhere, whatever the mode says

        def refuse(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.touch", refuse)
    else:
        (tmp_path / "locked" / "stages").mkdir(parents=True)
        (tmp_path / "locked" / "stages").chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write to workdir .*locked: Permission denied"):
        Store(tmp_path / "locked")


def test_a_store_leaves_no_probe(tmp_path):
    assert list(Store(tmp_path).folder.iterdir()) == []


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, "ü"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    null,\n    "ü"\n  ]\n}\n'
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"b": 1, "c": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None, "ü"]}
    write_json(path, 2)
    assert json.loads(path.read_text()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
