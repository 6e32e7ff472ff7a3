"""What every test runs under: eight CPU devices, no rank promotion, checked shapes, reproducible properties."""

import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

from mpo_jax.runtime import program_cache

pytest_plugins = ["tests.slowest", "tests.rotation"]

# a shell's background jobs ignore Ctrl-C, and so would the processes that tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# what colours and bars look like is tested, also where the tests themselves run without a terminal
os.environ["TERM"] = "xterm-256color"
for _name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(_name, None)

# XLA's older emitters compile in half the time; processes that tests start inherit the flag
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# compiled programs outlive the process, since compiling is most of the suite's time
_cache = os.environ.get("MPO_TEST_CACHE") or str(Path.home() / ".cache" / "mpo_jax" / "tests")
program_cache.use(_cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# only pure array functions: elsewhere the annotations are documentation, and checking every call would be slow
jaxtyping.install_import_hook(["mpo_jax.ops", "mpo_jax.losses", "mpo_jax.selection"], "beartype.beartype")

hypothesis.settings.register_profile("mpo", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("mpo")


LONGEST = ("pipeline", "examples", "stages", "cli", "models", "training")
"""Folders whose modules come first: were they last, one worker would wait for the other's."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Compiles as users do for a test with the mark `optimised`, and otherwise without most optimisations.

    How fast a test's programs run hardly matters; what a program holds or moves is tested as users compile it. Around
    the fixtures of all scopes, since some of them compile; processes that tests start inherit it.
    """
    unoptimised = item.get_closest_marker("optimised") is None
    jax.config.update("jax_disable_most_optimizations", unoptimised)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(unoptimised)))
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Ends a module's programs: they hold thousands of memory maps, and a process that has 65530 crashes."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with samples of the real data sets; too large for the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for folder in (beside, Path(os.environ.get("MPO_SHARED_DATA") or beside)):
        if folder.is_dir():
            return folder
    pytest.skip(f"no real data: neither {beside} nor the folder that MPO_SHARED_DATA names exists")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a real instruct model as a GGUF file of 98 MB."""
    fetched = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("MPO_SMOLLM2") or fetched)
    if not path.is_file():
        pytest.skip(f"no {path}: run launch/get_smollm2.sh, or name the file in MPO_SMOLLM2")
    return path
