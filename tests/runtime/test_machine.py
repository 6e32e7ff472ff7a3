"""mpo_jax.runtime.machine: what a process is started with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_jax.config.model import ModelConfig
from mpo_jax.runtime import machine

COUNT = """
from pathlib import Path
import jax
from mpo_jax.config.schema import RuntimeConfig
from mpo_jax.runtime import machine
machine.start(RuntimeConfig(cpu_devices=4, compilation_cache=None))
assert len(jax.devices()) == 4
print(sum("XLAEigen" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize(("given", "threads"), [(None, 16), ("5", 5)])
def test_simulated_devices_have_threads_to_wait_in(given, threads):
    """Four each, where all would wait for each other with one each; the user's own number is kept."""
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    if given is not None:
        environment["NPROC"] = given
    result = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == threads


@pytest.mark.parametrize(
    ("platform", "chosen"), [("tpu", "pallas"), ("cuda", "blocked"), ("cpu", "blocked"), (None, "blocked")]
)
def test_auto_chooses_attention_by_platform(platform, chosen):
    """Without one, that of this machine; a configured implementation stays."""
    assert machine.attention(ModelConfig(), platform) == chosen
    assert machine.attention(ModelConfig(attention="xla"), platform) == "xla"
