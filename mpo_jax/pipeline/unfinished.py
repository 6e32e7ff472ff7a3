"""What an unfinished stage has on disk, in words, for the message of a command that is stopped."""

from collections.abc import Mapping
from pathlib import Path

from etils import epath

from mpo_jax.errors import GOES_ON
from mpo_jax.runtime import parts
from mpo_jax.types import Artifact


def saved(folder: Path, checkpoints: Path | epath.Path, parents: Mapping[str, Artifact], *, trains: bool) -> str:
    """What is saved, and what the same command makes of it.

    Args:
      folder: the stage's unfinished folder.
      checkpoints: folder of the stage's checkpoints. A bucket is not asked: it may take longer than a user waits.
      parents: finished stages from which this one starts.
      trains: whether the stage saves checkpoints.
    """
    if not isinstance(checkpoints, Path):
        return f"{GOES_ON} what is saved in the bucket"
    # one that is still being written has a longer name
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    if steps:
        return f"step {max(steps)} is saved; {GOES_ON} there"
    nothing = "no step is saved yet" if trains else "no row is saved yet"
    if any(folder.glob(f"{parts.FOLDER}/*/{parts.MANIFEST}")):
        rows = f"{GOES_ON} the rows that are saved"
        return f"{nothing}; {rows}" if trains else rows
    names = sorted({artifact.path.name for artifact in parents.values()})
    begins = f"{GOES_ON} the finished {', '.join(names)}" if names else "the same command begins it anew"
    return f"{nothing}; {begins}"
