"""Stages that the seeds of a table share (`sft.seed`, `reward.seed`): one seed makes them, the others take them."""

import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mpo_jax.errors import Damaged
from mpo_jax.pipeline.bucket import CHECKPOINTS
from mpo_jax.pipeline.recipe import MANIFEST, read_manifest
from mpo_jax.runtime import parts
from mpo_jax.runtime.files import anew
from mpo_jax.types import REMOVED

_SEED = re.compile(r"seed-\d+")


def place_of(folder: Path) -> Path:
    """Where a finished stage is: in its folder, else in that of another seed; its folder if no seed has finished it.

    Args:
      folder: `<workdir>/stages/<name>`; only `<table>/seed-N` has other seeds beside it.

    Raises:
      Damaged: if another seed's is damaged: this seed's own would be a copy of that, or hours of work again.
    """
    # what is there without a manifest is in the way, as its reader says
    if os.path.lexists(folder) or not _SEED.fullmatch(folder.absolute().parent.parent.name):
        return folder
    table = folder.absolute().parent.parent.parent
    others = (path.parent for path in sorted(table.glob(f"seed-*/stages/{folder.name}/{MANIFEST}")))
    # one without its model would have to be made again, and here is as good a place
    found = next((other for other in others if REMOVED not in read_manifest(other)), folder)
    _check_model(found)
    return found


def take(folder: Path) -> bool:
    """Takes a stage that another seed has finished; whether there was one.

    Its files are hard links, which need no space and outlive the other seed's folder; on disks without them, copies.
    """
    source = place_of(folder)
    if source == folder:
        return False
    taken = folder.with_name(f".{folder.name}.taken")
    shutil.rmtree(taken, ignore_errors=True)
    apart = shutil.ignore_patterns(CHECKPOINTS, parts.FOLDER)
    shutil.copytree(source, taken, ignore=apart, copy_function=_link)
    taken.rename(folder)
    return True


def _check_model(folder: Path) -> None:
    """Raises Damaged if the headers of a stage's model cannot be read, or it has none beside its configuration."""
    model = folder / "model"
    files = sorted(model.glob("*.safetensors"))
    if not files and (model / "config.json").exists():
        raise Damaged(model, "has no weights", anew(folder))
    for path in files:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise Damaged(path, f"is damaged ({error})", anew(folder)) from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
