"""Stages, checkpoints and results outside the workdir: in a mounted folder, and in an emulated Google bucket."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.core import url_to_fs
from fsspec.registry import _registry as remembered

from mpo_jax.config.load import load_config
from mpo_jax.errors import UserError
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.bucket import Bucket, stage_place
from mpo_jax.pipeline.recipe import make_recipe
from mpo_jax.pipeline.table import table_stages
from mpo_jax.tools import doctor
from tests.commands import MPO
from tests.pipeline.test_pipeline import mpo, stages
from tests.test_kills import MICRO, assert_same, folder_of
from tests.test_multi_process import CACHE, Pair

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    """An emulated bucket's address; processes started meanwhile see it too."""
    core = pytest.importorskip("gcsfs.core")
    pytest.importorskip("gcp_storage_emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    start = [sys.executable, "-m", "tests.google_bucket", str(port)]
    server = subprocess.Popen(
        start, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    create = urllib.request.Request(
        f"{address}/storage/v1/b?project=p", b'{"name": "runs"}', {"Content-Type": "application/json"}
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # credentials and the kind of bucket would be asked of servers that are not there, for half a minute
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setitem(remembered, "gs", core.GCSFileSystem)
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(create, timeout=10).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield "gs://runs"
        finally:
            server.kill()
            server.wait()


@pytest.fixture(params=["file", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new folder of either kind."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket"
    return f"{request.getfixturevalue('google')}/{tmp_path.name}"


def names(url: str) -> list[str]:
    fs, root = url_to_fs(url, use_listings_cache=False)
    return sorted(path.removeprefix(f"{root}/") for path in fs.find(root))


def sft(settings: dict | None = None) -> dict:
    """What a stage is made from."""
    return make_recipe("sft", settings or {}, {}, {})


def writes(text: str, calls: list[str]):
    def run(folder: Path) -> dict:
        calls.append(text)
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "large").write_text("not to be kept")
        return {"rows": 3}

    return run


def test_what_one_workdir_made_another_fetches(url: str, tmp_path: Path) -> None:
    calls: list[str] = []
    first, second = (Store(tmp_path / name, bucket=Bucket(url)) for name in ("a", "b"))
    base = first.build(sft({"lr": 1}), writes("w", calls))
    assert names(url) == [f"stages/{base.id}/manifest.json", f"stages/{base.id}/model/weights"]
    again = second.build(sft({"lr": 1}), writes("other", calls))
    assert calls == ["w"] and second.reused == [base.id] and again.manifest == base.manifest
    assert (again.path / "model" / "weights").read_text() == "w" and again.path.parent == tmp_path / "b" / "stages"
    assert sorted(path.name for path in again.path.parent.iterdir() if "lock" not in path.name) == [base.id]
    second.build(sft({"lr": 2}), writes("new", calls))
    assert calls == ["w", "new"]


def test_parts_of_a_pass_are_sent_as_they_are_made_and_fetched_with_their_stage(url: str, tmp_path: Path) -> None:
    """Each once: what is sent with the whole folder would be sent again and again."""
    bucket, folder = Bucket(url), tmp_path / ".select-1.partial"
    place = folder / "parts" / "samples"
    place.mkdir(parents=True)
    for name in ("recipe.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    for name in ("00000.safetensors", "00001.safetensors", "manifest.json"):
        (place / name).write_text(name)
    bucket.send(folder, stage_place(folder))
    whole = [f"{stage_place(folder)}/{name}" for name in ("metrics.jsonl", "recipe.json")]
    assert names(url) == whole
    inside = f"{stage_place(folder)}/parts/samples"
    bucket.send(place, inside, files=[place / "00001.safetensors"], last="manifest.json")
    assert names(url) == sorted([*whole, f"{inside}/00001.safetensors", f"{inside}/manifest.json"])
    shutil.rmtree(folder)
    bucket.fetch(stage_place(folder), folder)
    assert (place / "00001.safetensors").read_text() == "00001.safetensors"


def test_a_finished_stage_has_no_parts(tmp_path: Path) -> None:
    def run(folder: Path) -> dict:
        (folder / "parts" / "samples").mkdir(parents=True)
        (folder / "result").write_text("r")
        return {}

    made = Store(tmp_path).build(sft(), run)
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "result"]


def test_what_was_made_without_it_is_sent(url: str, tmp_path: Path) -> None:
    calls: list[str] = []
    base = Store(tmp_path / "a").build(sft(), writes("w", calls))
    Store(tmp_path / "a", bucket=Bucket(url)).build(sft(), writes("w", calls))
    assert calls == ["w"] and Bucket(url).read(f"stages/{base.id}/manifest.json") == base.manifest


def test_a_stage_is_whole_only_with_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kill leaves of a transfer, nobody takes it for a finished stage."""
    url, calls = f"file://{tmp_path}/bucket", []
    base = Store(tmp_path / "a", bucket=Bucket(url)).build(sft(), writes("w", calls))
    (tmp_path / "bucket" / "stages" / base.id / "manifest.json").unlink()
    store = Store(tmp_path / "b", bucket=Bucket(url))
    store.build(sft(), writes("again", calls))
    assert calls == ["w", "again"]
    # and on this side: a fetch that breaks off leaves no folder of the stage's name
    bucket = Bucket(url)

    def breaks(found: list[str], targets: list[str]) -> None:
        Path(targets[0]).write_text("half")
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(bucket._fs, "get", breaks)
    with pytest.raises(UserError, match=r"cannot fetch stages/sft-.*the line is dead.*the same command") as told:
        Store(tmp_path / "c", bucket=bucket).build(sft(), writes("x", calls))
    assert url in str(told.value) and not list((tmp_path / "c" / "stages").glob("sft-*"))
    monkeypatch.undo()
    Store(tmp_path / "c", bucket=Bucket(url)).build(sft(), writes("x", calls))
    assert calls == ["w", "again"]


def test_a_stage_that_could_not_be_sent_is_there_and_is_sent_later(tmp_path: Path) -> None:
    calls: list[str] = []
    (tmp_path / "bucket").mkdir()
    store = Store(tmp_path / "a", bucket=Bucket(f"file://{tmp_path}/bucket"))
    (tmp_path / "bucket").rmdir()
    (tmp_path / "bucket").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot send stages/sft-"):
        store.build(sft(), writes("w", calls))
    assert [path.name for path in (tmp_path / "a" / "stages").glob("sft-*")]
    (tmp_path / "bucket").unlink()
    base = store.build(sft(), writes("w", calls))
    assert calls == ["w"] and f"stages/{base.id}/manifest.json" in names(f"file://{tmp_path}/bucket")


def log(workdir: Path) -> Path:
    return folder_of(workdir, "sft") / "metrics.jsonl"


LONG = ("sft", str(MICRO), "sft.train.steps=15", "sft.train.checkpoint_every=3", CACHE, "runtime.cpu_devices=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir in which SFT was made without a kill."""
    workdir = tmp_path_factory.mktemp("whole")
    subprocess.run([*MPO, *LONG, f"workdir={workdir}"], check=True, capture_output=True)
    return workdir


@pytest.mark.processes
def test_a_killed_stage_goes_on_in_another_workdir_to_the_same_bits(url: str, whole: Path, tmp_path: Path) -> None:
    """The machine is lost with its disk: its checkpoints and metrics are in the bucket."""
    command = [*MPO, *LONG]
    with (tmp_path / "said").open("w") as said:
        begun = subprocess.Popen(
            [*command, f"workdir={tmp_path / 'lost'}", f"runtime.bucket={url}"], stdout=said, stderr=said
        )
        fs, root = url_to_fs(url, use_listings_cache=False)
        deadline = time.time() + 200
        # Orbax renames where it can, and marks a whole checkpoint by a file where it cannot
        mark = "*/_CHECKPOINT_METADATA" if url.startswith("file") else "*/commit_success.txt"
        while begun.poll() is None and time.time() < deadline:
            if any(".orbax" not in path for path in fs.glob(f"{root}/stages/.sft-*.partial/checkpoints/{mark}")):
                break
            time.sleep(0.02)
        begun.kill()
    assert begun.wait() == -signal.SIGKILL, (tmp_path / "said").read_text()
    kept = names(url)
    assert not any(name.endswith("manifest.json") for name in kept)
    assert any(name.endswith(".partial/metrics.jsonl") for name in kept)
    shutil.rmtree(tmp_path / "lost")

    found = subprocess.run(
        [*command, f"workdir={tmp_path / 'new'}", f"runtime.bucket={url}"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert_same(folder_of(whole, "sft"), folder_of(tmp_path / "new", "sft"))
    # the new process made the later steps alone
    lines = [json.loads(line) for line in log(tmp_path / "new").read_text().splitlines()]
    firsts = [line["step"] for line in lines if "timing_s/compile" in line]
    assert len(firsts) >= 2 and firsts[0] == 1 and firsts[-1] > 3
    left = names(url)
    assert any(name.endswith("manifest.json") for name in left) and not any(".partial" in name for name in left)


@pytest.mark.processes
def test_processes_need_no_shared_disk(tmp_path: Path) -> None:
    """Two hosts with a workdir each: what process 0 publishes, process 1 fetches before the next stage reads it."""
    own = tuple((f"workdir={tmp_path / name}", "runtime.cpu_devices=1") for name in ("a", "b"))
    pair = Pair(tmp_path, "reward", str(MICRO), "mesh.fsdp=2", f"runtime.bucket=file://{tmp_path}/bucket", own=own)
    assert pair.wait() == [0, 0], pair.text(0)[-3000:] + pair.text(1)[-3000:]
    assert len(stages(tmp_path / "a")) == 2
    assert stages(tmp_path / "a").keys() == stages(tmp_path / "b").keys()
    assert not [path for path in (tmp_path / "b" / "stages").iterdir() if path.name.endswith(".partial")]
    for stage in ("sft", "reward"):
        (one,), (other,) = ((tmp_path / name / "stages").glob(f"{stage}-*/model/model.safetensors") for name in "ab")
        assert one.read_bytes() == other.read_bytes()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, tuple[str, ...]]:
    """A table that was made with a bucket, its bucket, and the command's arguments but for the workdir."""
    folder = tmp_path_factory.mktemp("table")
    url = f"file://{folder}/bucket"
    arguments = (str(MICRO), "seeds=0", "experiment=dpo", f"runtime.bucket={url}", CACHE)
    assert mpo("table", *arguments, f"workdir={folder / 'a'}") == 0
    return folder, url, arguments


def test_a_table_is_there_on_another_machine(table, capsys: pytest.CaptureFixture[str]) -> None:
    folder, url, arguments = table
    kept = names(url)
    for file in (
        "table.yaml",
        "report/index.html",
        "tables/all.md",
        "seed-0/runs/dpo/config.yaml",
        "seed-0/runs/dpo/env.json",
    ):
        assert file in kept, kept
    assert sum(name.endswith("/manifest.json") for name in kept) == len(stages(folder / "a" / "seed-0")) == 5
    planned = table_stages(load_config(MICRO, ("table.seeds=0", "table.experiment=dpo", f"runtime.bucket={url}",
                                             f"workdir={folder / 'b'}", CACHE)))  # fmt: skip
    assert all(stage.is_there for stage in planned) and len(planned) == 5
    capsys.readouterr()
    assert mpo("table", *arguments, f"workdir={folder / 'b'}") == 0
    assert "0 stages made, 5 reused" in capsys.readouterr().out
    claims = [(folder / name / "tables" / "by_seed.csv").read_text() for name in ("a", "b")]
    assert claims[0] == claims[1]


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_doctor(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BUCKET_MIB", 2)  # the emulator takes no upload in several parts
    found = doctor.bucket(url)
    assert found.verdict == "ok" and "MB/s sent" in found.found and names(url) == []
    (tmp_path / "file").write_text("")
    bad = doctor.bucket(f"file://{tmp_path}/file")
    assert bad.verdict == "fail" and "cannot send" in bad.advice


def test_s3_holds_stages_and_no_checkpoints(tmp_path: Path) -> None:
    """What Orbax cannot write to; no store is asked here."""
    pytest.importorskip("s3fs")
    bucket = Bucket("s3://runs/x")
    assert not bucket.takes_checkpoints
    assert bucket.checkpoints(tmp_path / ".sft-1.partial") == tmp_path / ".sft-1.partial" / "checkpoints"


def test_addresses_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"runtime\.bucket"):
        load_config(None, ("runtime.bucket=/a/folder",))
    with pytest.raises(UserError, match="keep_finished_checkpoints=true keeps them in workdir"):
        load_config(None, ("runtime.bucket=file:///a", "runtime.keep_finished_checkpoints=true"))
    for package, protocols in {"gcsfs": ("gs", "gcs"), "s3fs": ("s3", "s3a")}.items():
        monkeypatch.setitem(sys.modules, package, None)
        for protocol in protocols:
            # fsspec remembers what it has imported
            monkeypatch.delitem(remembered, protocol, raising=False)
    for url in ("gs://runs/x", "s3://runs/x"):
        with pytest.raises(UserError, match=r"setup\.sh bucket"):
            Bucket(url)


def test_no_such_bucket_is_one_message(google: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mpo("sft", str(MICRO), CACHE, f"workdir={tmp_path}", "runtime.bucket=gs://nobody-s/x") == 2
    told = capsys.readouterr().err
    assert "runtime.bucket=gs://nobody-s/x: cannot write to it" in told and "Traceback" not in told
