"""Findings of `mpo doctor`, each shown what it should warn of."""

import dataclasses
import http.server
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mpo_jax.config.schema import MeshConfig
from mpo_jax.tools import doctor
from mpo_jax.tools.doctor import Check
from tests.pipeline.test_pipeline import MICRO, mpo


def device(platform: str, kind: str) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, device_kind=kind)


def test_the_command_on_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "DISK_MIB", 4)
    assert mpo("doctor", MICRO, f"workdir={tmp_path}", "mesh.fsdp=8") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[5:].partition(":")[0] for line in lines if line.startswith(("ok", "warn", "FAIL"))]
    assert names == [
        "versions", "compilers", "compiler flags", "devices", "mesh", "memory", "interconnect", "disk", "model", "data",
        "compilation cache", "hub", "clocks", "matmul", "collective",
    ]  # fmt: skip
    assert any("8 devices: all-gather at" in line for line in lines)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_status_1_where_a_check_fails(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda config: iter([Check("links", "fail", "bad", "mend them")]))
    assert mpo("doctor") == 1
    assert "FAIL links: bad\n       mend them" in capsys.readouterr().out


def test_libraries_of_another_version_than_jax(monkeypatch):
    real = doctor._version
    assert doctor.versions().verdict == "ok"
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1.2" if name == "jax-cuda12-pjrt" else real(name))
    found = doctor.versions()
    assert found.verdict == "fail" and f"jax-cuda12-pjrt 0.1.2 beside jax {jax.__version__}" in found.advice


@pytest.mark.parametrize(("hardware", "extra"), [({"gpu"}, "cuda12"), ({"tpu"}, "tpu")])
def test_an_accelerator_that_jax_does_not_use(hardware, extra):
    found = doctor.devices([device("cpu", "cpu")], hardware)
    assert found.verdict == "fail" and f"launch/setup.sh {extra}" in found.advice
    assert doctor.devices([device("gpu", "NVIDIA A100")] * 8, {"gpu"}).verdict == "ok"
    assert doctor.devices([device("cpu", "cpu")], set()).verdict == "ok"


def test_the_mesh_against_the_devices():
    assert doctor.mesh(MeshConfig(fsdp=8), 8).verdict == "ok"
    assert doctor.mesh(MeshConfig(fsdp=16), 8).verdict == "fail"
    found = doctor.mesh(MeshConfig(fsdp=4), 8)
    assert found.verdict == "warn" and "idle: 4 devices" in found.advice


NVLINK = """\
        GPU0    GPU1    CPU Affinity
GPU0     X      NV12    0-23
GPU1    NV12     X      0-23
"""


def test_wiring():
    assert doctor.wiring(NVLINK, 2) == Check("interconnect", "ok", "2 GPUs, NVLink")
    found = doctor.wiring(NVLINK.replace("NV12", "SYS "), 2)
    assert found.verdict == "warn" and "some joined by SYS" in found.found and "mesh.data" in found.advice


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_MIB", 2)
    monkeypatch.setattr(doctor, "LITTLE_SPACE_GIB", 0)
    found = doctor.disk(tmp_path / "not" / "there")
    assert str(tmp_path) in found.found and "GiB free" in found.found
    monkeypatch.setattr(doctor, "SLOW_DISK_MBS", 10**9)
    assert doctor.disk(tmp_path).verdict == "warn"
    monkeypatch.setattr(doctor, "LITTLE_SPACE_GIB", 10**9)
    assert "160 GB for 7B" in doctor.disk(tmp_path).advice
    assert list(tmp_path.iterdir()) == []

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    found = doctor.disk(tmp_path)
    assert found.verdict == "fail" and "Permission denied" in found.advice


def test_the_compilation_cache(tmp_path, monkeypatch):
    assert doctor.cache(None).verdict == "warn"
    assert doctor.cache(str(tmp_path / "new")).verdict == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "runtime.compilation_cache" in doctor.cache(str(tmp_path)).advice


@pytest.fixture
def endpoint() -> Iterator[str]:
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_hub(endpoint):
    assert doctor.hub({"HF_ENDPOINT": endpoint}).found == "reached; no HF_TOKEN"
    reached = doctor.hub({"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret"})
    assert reached.verdict == "ok" and "secret" not in reached.found
    missed = doctor.hub({"HF_ENDPOINT": "http://127.0.0.1:1"})
    assert missed.verdict == "warn" and "HF_HUB_OFFLINE=1" in missed.advice
    assert doctor.hub({"HF_HUB_OFFLINE": "1"}).verdict == "ok"
    assert doctor.hub({"HF_ENDPOINT": "file:///etc"}).verdict == "warn"


def test_clocks():
    assert doctor.clock_spread(np.asarray([1e9, 1e9 + 0.25])) == Check("clocks", "ok", "2 processes, 250 ms apart")
    assert doctor.clock_spread(np.asarray([1e9, 1e9 + 5.0])).verdict == "warn"


def test_a_slow_device_and_a_wrong_one(monkeypatch):
    assert doctor.matmul().verdict == "ok"
    monkeypatch.setattr(doctor, "similar_kind", lambda name: SimpleNamespace(bf16_tflops=1e6))
    assert doctor.matmul().verdict == "warn"
    real = jax.jit
    monkeypatch.setattr(doctor.jax, "jit", lambda f, **options: real(lambda *x: f(*x) + 1, **options))
    assert doctor.matmul().verdict == "fail" and doctor.collective().verdict == "fail"


def test_findings_say_how_to_mend_what_is_not_well():
    """A Check that warns or fails always says what to do; those above are all there are."""
    for found in (doctor.cache(None), doctor.mesh(MeshConfig(fsdp=16), 8), doctor.clock_spread(np.asarray([0.0, 9.0]))):
        assert dataclasses.asdict(found)["advice"]
