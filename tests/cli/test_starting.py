"""The start of a command: what it says before the libraries are there, and what it does not import at all."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_jax.cli.starting import RANKS, starting
from mpo_jax.config.load import load_config
from mpo_jax.runtime.version import __version__

MICRO = Path(__file__).parents[1] / "configs" / "micro.yaml"
HEAVY = ("jax", "numpy", "flax", "transformers", "orbax", "optax", "pyarrow", "scipy", "matplotlib", "tensorstore")
LOADED = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
from mpo_jax.cli import main; main()
"""
AT_JAX = """
import sys
class AtJax:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            print("importing jax", flush=True)
            raise SystemExit(0)
sys.meta_path.insert(0, AtJax())
from mpo_jax.cli import main; main()
"""
"""`mpo` up to the import of JAX."""
COLLECTIONS = f"""
import gc, sys
from pathlib import Path
from mpo_jax.cli.starting import starting
from mpo_jax.config.load import load_config
try:
    with starting("run", Path("x.yaml"), load_config({str(MICRO)!r})):
        print(gc.isenabled())
        raise ImportError("a package is broken")
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""


def run(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in RANKS} | variables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("run", "--help"),
        ("--version",),
        ("generate", "-h"),
        ("config", str(MICRO)),
        ("config", "--keys", "ppo"),
    ],
)
def test_what_computes_nothing_imports_no_library_that_does(arguments):
    done = run(LOADED, *arguments)
    assert done.stdout and done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("command", "names"),
    [("run", "mpo"), ("sft", "mpo"), ("table", "sft, dpo")],
)
def test_a_command_says_what_it_starts_before_it_imports_jax(command, names):
    given = ["table.experiment=sft,dpo", "workdir=here"]
    first, second = run(AT_JAX, command, str(MICRO), *given).stdout.splitlines()
    assert first.startswith(f"mpo {__version__} {command} {MICRO}: {names} in here (Python 3.")
    assert ", jax " in first and second == "importing jax"


@pytest.mark.parametrize(
    ("overrides", "variables", "speaks"),
    [
        ((), {"SLURM_PROCID": "0"}, True),
        ((), {"SLURM_PROCID": "3"}, False),
        (("runtime.processes.index=0",), {"SLURM_PROCID": "3"}, True),
        (("runtime.processes.index=1",), {}, False),
    ],
)
def test_of_several_processes_the_first_speaks(overrides, variables, speaks):
    said = run(AT_JAX, "run", str(MICRO), *overrides, **variables).stdout.splitlines()
    assert said[-1] == "importing jax" and len(said) == 1 + speaks


def test_nothing_is_said_about_a_configuration_that_is_refused():
    command = [sys.executable, "-c", AT_JAX, "run", str(MICRO), "sft.train.stepz=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout


def test_imports_are_not_collected_and_all_that_follows_is():
    assert run(COLLECTIONS).stdout.splitlines()[-2:] == ["False", "True True"]


def test_garbage_of_a_process_that_uses_jax_already_stays_collectable(capsys):
    frozen = gc.get_freeze_count()
    with starting("run", MICRO, load_config(MICRO)):
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen
