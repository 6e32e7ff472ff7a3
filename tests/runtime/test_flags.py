"""Recommended compiler flags: known to the installed libraries, never above the user's own, never unknown ones."""

import os
import subprocess
import sys

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.runtime import flags
from mpo_jax.runtime.flags import RECOMMENDED, VARIABLE, Flag, apply, detect, known, libraries


def test_each_flag_has_a_reason_and_one_place():
    for recommended in RECOMMENDED.values():
        assert len({flag.name for flag in recommended}) == len(recommended)
        assert all(flag.name.startswith("xla_") and len(flag.reason) > 20 for flag in recommended)


def test_gpu_flags_are_known_to_the_installed_jaxlib():
    names = {flag.name for flag in RECOMMENDED["gpu"]}
    assert known(names, libraries("cpu")) == names
    assert known(["xla_gpu_no_such_flag", "xla_gpu_enable_latency_hiding_sched"], libraries("cpu")) == set()


def test_xla_starts_with_them():
    """XLA ends the process on a flag that it does not know, as the second call shows."""
    program = "import jax; jax.config.update('jax_platforms', 'cpu'); print(jax.numpy.zeros(()) + 1)"
    for extra, status_is_zero in [("", True), (" --xla_gpu_no_such_flag=1", False)]:
        value = " ".join(map(str, RECOMMENDED["gpu"])) + extra
        environment = {**os.environ, "XLA_FLAGS": value}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) is status_is_zero, done.stderr


def test_a_flag_of_the_user_stays(monkeypatch):
    name = RECOMMENDED["gpu"][0].name
    monkeypatch.setattr(flags, "libraries", lambda platform: libraries("cpu"))
    environment = {"XLA_FLAGS": f"--{name}=false --xla_dump_to=/tmp/x"}
    chosen, unknown = apply("gpu", environment)
    assert chosen == list(RECOMMENDED["gpu"][1:]) and unknown == []
    assert environment["XLA_FLAGS"].startswith(f"--{name}=false --xla_dump_to=/tmp/x --xla_gpu_enable_pipelined")


def test_an_unknown_flag_is_left_out(monkeypatch):
    monkeypatch.setattr(flags, "libraries", lambda platform: libraries("cpu"))
    monkeypatch.setitem(RECOMMENDED, "gpu", (*RECOMMENDED["gpu"], Flag("xla_gpu_no_such_flag", "true", "none")))
    environment: dict[str, str] = {}
    chosen, unknown = apply("gpu", environment)
    assert [flag.name for flag in unknown] == ["xla_gpu_no_such_flag"] and len(chosen) == len(RECOMMENDED["gpu"]) - 1
    assert "no_such_flag" not in environment["XLA_FLAGS"]


def test_without_the_library_nothing_is_set(monkeypatch):
    monkeypatch.setattr(flags, "libraries", lambda platform: [])
    environment: dict[str, str] = {}
    assert apply("tpu", environment) == ([], list(RECOMMENDED["tpu"]))
    assert environment == {VARIABLE["tpu"]: ""}


def test_platforms_are_told_apart(tmp_path, monkeypatch):
    assert detect({"JAX_PLATFORMS": "cuda,cpu"}) == "gpu"
    assert detect({"JAX_PLATFORMS": "tpu"}) == "tpu"
    assert detect({"JAX_PLATFORMS": "cpu"}, tmp_path) == "cpu"
    assert detect({}, tmp_path) == "cpu"
    monkeypatch.setattr(flags, "_library", lambda *modules, pattern="": [tmp_path])
    (tmp_path / "accel0").touch()
    assert detect({}, tmp_path) == "tpu"
    (tmp_path / "nvidiactl").touch()
    assert detect({}, tmp_path) == "gpu"


def test_the_key():
    assert load_config(None).runtime.flags == "none"
    assert load_config(None, ("runtime.flags=recommended",)).runtime.flags == "recommended"


@pytest.mark.plan
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_accelerator_s_own_library_knows_them(platform):
    names = {flag.name for flag in RECOMMENDED[platform]}
    assert len(libraries(platform)) == (2 if platform == "gpu" else 1)
    assert known(names, libraries(platform)) == names
