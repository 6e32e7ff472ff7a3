"""A run's folder, `runs/<name>`: its configuration, the machine that made it, and links to its stages."""

import re
from pathlib import Path
from typing import Any

from mpo_jax.config.load import read_record
from mpo_jax.config.registry import EXPERIMENTS
from mpo_jax.config.schema import Config
from mpo_jax.errors import Damaged, UserError
from mpo_jax.pipeline.experiments import Variant, is_run
from mpo_jax.pipeline.recipe import MANIFEST, RECIPE
from mpo_jax.runtime.files import anew, naming_damage, read_object

CONFIG = "config.yaml"
ENVIRONMENT = "env.json"
MADE = "stages"
"""The entry of the environment that lists a run's roles, so that a stage that is gone is told from one never made."""
SECTIONS = ("seed", "model", "data", "runtime")
"""What every record has, the last section included."""
_STEP = re.compile(r"(\d+)-\w+")


def is_run_folder(folder: Path) -> bool:
    """Whether it is a run's folder, even if one of its two files is missing."""
    return (folder / ENVIRONMENT).is_file() or (
        folder.absolute().parent.name == "runs" and is_run(folder.name) and folder.is_dir()
    )


def remedy(folder: Path) -> str:
    """What to do about a damaged file or link in a run's folder."""
    return f"delete the folder {folder}; `mpo run` of its configuration writes it again from the finished stages"


def read_config(path: Path) -> Config:
    """The configuration in a run's or a stage's folder.

    Raises:
      Damaged: if it is missing or cannot be read.
      UserError: if it is not valid: names the key.
    """
    folder = path.parent
    of_stage = any((folder / name).is_file() for name in (MANIFEST, RECIPE))
    advice = anew(folder) if of_stage else remedy(folder)
    with naming_damage(path, advice):
        text = path.read_text(encoding="utf-8")
    # a record that was cut off is still valid YAML: what it lacks would get the defaults
    if not all(f"\n{section}:" in text for section in SECTIONS):
        raise Damaged(path, "is not whole", advice)
    try:
        with naming_damage(path, advice):
            return read_record(path)
    except Damaged:
        raise
    except UserError as error:
        raise Damaged(path, f"is damaged, or of another version ({error})", advice) from error


def read_environment(folder: Path) -> dict[str, Any]:
    """Versions and devices that a run was made on, and its command.

    Raises:
      Damaged: if the file is missing or damaged.
    """
    found = read_object(folder / ENVIRONMENT, remedy(folder))
    if not found or any(not _is_texts(found.get(key, [])) for key in ("command", "devices")):
        raise Damaged(folder / ENVIRONMENT, "is damaged (no environment)", remedy(folder))
    return found


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def stage_links(folder: Path) -> dict[str, Path]:
    """The stages of a run by role.

    Raises:
      Damaged: if a link leads nowhere, or something is no link to a stage.
    """
    if not folder.is_dir():
        raise Damaged(folder, "is no folder", f"delete it; {remedy(folder).partition('; ')[2]}")
    found = {}
    for link in sorted(folder.iterdir()):
        if link.name in (CONFIG, ENVIRONMENT):
            continue
        if link.is_symlink() and not link.is_dir():
            raise Damaged(link, f"is a link to {link.readlink()}, where no stage is", remedy(folder))
        if link.is_dir():
            found[link.name] = link.resolve()
    return found


def roles(folder: Path) -> list[str]:
    """The roles that a run was recorded with; all of its experiment where the record does not say."""
    try:
        found = read_environment(folder).get(MADE)
    except Damaged:
        found = None
    if isinstance(found, list) and all(isinstance(role, str) for role in found):
        return found
    steps = enumerate(EXPERIMENTS[Variant.of(folder.name).experiment], 1)
    return ["sft", *(f"{number}-{step.algorithm}" for number, step in steps), "evaluate"]


def is_up_to_reward(folder: Path) -> bool:
    """Whether a run's folder is that of a run whose last stage is its reward model, as `mpo reward` leaves it."""
    made = stage_links(folder)
    return "reward" in made and made.keys() <= {"sft", "reward"}


def last_step(folder: Path) -> Path:
    """The link to a run's final policy: that of its last step, or SFT.

    Raises:
      Damaged: as `stage_links`.
    """
    # not the last one that is there: without a link to the last, an earlier step's model would pass for the run's
    made = roles(folder) if is_run(folder.name) else stage_links(folder)
    steps = [(int(found[1]), role) for role in made if (found := _STEP.fullmatch(role))]
    link = folder / (max(steps)[1] if steps else "sft")
    stage_links(folder)
    if not link.is_dir():
        why = "is a file and should be a link" if link.exists() else "is missing"
        raise Damaged(link, why, remedy(folder))
    return link
