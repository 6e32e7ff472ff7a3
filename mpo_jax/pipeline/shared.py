"""Stages that the seeds of a table share (`sft.seed`, `reward.seed`): one seed makes them, the others take them."""

import os
import re
import shutil
from pathlib import Path

from mpo_jax.errors import Damaged, UserError
from mpo_jax.models.hf.safetensors_folder import SafetensorsFolder
from mpo_jax.pipeline.bucket import CHECKPOINTS
from mpo_jax.pipeline.recipe import MANIFEST, read_manifest
from mpo_jax.runtime import parts
from mpo_jax.runtime.files import anew
from mpo_jax.types import REMOVED

_SEED = re.compile(r"seed-(0|[1-9]\d*)")


def seed_folders(table: Path) -> dict[int, Path]:
    """The workdirs of a table's seeds, `<table>/seed-N`, in the order of the seeds; none where it is no table."""
    found = {int(path.name.removeprefix("seed-")): path for path in table.glob("seed-*") if _SEED.fullmatch(path.name)}
    return dict(sorted(found.items()))


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
    seeds = seed_folders(folder.absolute().parent.parent.parent).values()
    others = [other for seed in seeds if ((other := seed / "stages" / folder.name) / MANIFEST).is_file()]
    # one without its model would have to be made again, and here is as good a place
    found = next((other for other in others if REMOVED not in read_manifest(other)), folder)
    if found != folder:
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
    """Raises Damaged if a stage's model is gone, or the headers of its weights are not as they were written."""
    model = folder / "model"
    if "steps" not in read_manifest(folder).get("summary", {}) and not any(model.glob("*.safetensors*")):
        return
    try:
        SafetensorsFolder(model).check()
    except UserError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            # of the disk or of permissions: what is there may be whole
            raise
        raise Damaged(folder, f"has no model that can be read ({error})", anew(folder)) from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
