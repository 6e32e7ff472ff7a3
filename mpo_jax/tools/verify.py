"""`mpo verify`: retrains the steps between two stored states and compares the hashes of the final states."""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from mpo_jax.config.schema import Config, ProcessesConfig
from mpo_jax.errors import CheckpointsLost, Damaged, Preempted, UserError
from mpo_jax.pipeline.keeping import is_removed
from mpo_jax.pipeline.recipe import FORMAT, RECIPE, artifact_name, is_stage_folder, read_manifest, read_recipe
from mpo_jax.pipeline.run_folder import CONFIG, read_config
from mpo_jax.pipeline.shared import seed_folders
from mpo_jax.pipeline.stages import STAGES, stage_context
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import anew, write_json
from mpo_jax.runtime.interrupts import STOPS
from mpo_jax.runtime.preemption import stopping_at
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.stages.context import Inputs
from mpo_jax.tools.report.results import METRICS, read_metrics
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.hashes import LANES, first_difference, state_hash
from mpo_jax.types import Artifact
from mpo_jax.untrusted import loads

KEPT_FOR_VERIFY = "delete this folder; a finished stage needs it for mpo verify alone"
INPUT_NAMES = {
    "data": "the rows of the section data",
    "base": "the base model, model.path,",
    "reward_model": "the reward model, reward.path,",
    "reward_function": "reward.function",
}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The steps to retrain and the expected result.

    Attributes:
      start: step of the checkpoint to start from.
      end: later step with a known state hash.
      expected: state hash at `end`.
      leaves: hash of each leaf at `end`, if there is a checkpoint; else None.
      sha256: whether these are sha256 of the checkpoints' arrays, instead of the hashes that training recorded.
    """

    start: int
    end: int
    expected: str
    leaves: Mapping[str, str] | None
    sha256: bool = False


def verify(workdir: Path, stage: str | None, *, sha256: bool = False) -> bool:
    """Whether every stage that can be checked reproduces its recorded states bit for bit; prints a line for each.

    Bitwise equality is guaranteed only on the same devices, mesh and versions.

    Args:
      workdir: of runs, or of a table, whose seeds are then all checked.
      stage: kind of stage (sft, reward, dpo, ppo) or folder name of one stage; None for all.
      sha256: whether to compare sha256 of the last two checkpoints' arrays on disk, instead of the 128-bit hashes that
        training takes on the devices. So are checkpoints of earlier versions, whose recorded hashes are others.

    Raises:
      UserError: if there is nothing to check.
    """
    results, errors, seen = list[bool](), list[str](), set[str]()
    table = [folder for folder in seed_folders(workdir).values() if (folder / "stages").is_dir()]
    if not table and not (workdir / "stages").is_dir():
        raise UserError(f"{workdir} is no workdir with stages: name the folder that a run was given as workdir=DIR")
    folders = [folder for one in [workdir, *table] for folder in _stage_folders(one)]
    # of a stage that a table's seeds share, the one with the checkpoints
    for folder in sorted(folders, key=lambda folder: not (folder / "checkpoints").is_dir()):
        name = folder.name.removeprefix(".").removesuffix(".partial")
        try:
            # a table's seeds may share stages
            known = name in seen and not (folder / "checkpoints").is_dir()
            if known or (recipe := _trained(folder, name, stage)) is None:
                continue
            seen.add(name)
            with FileLock(folder.parent / f".{name}.lock", timeout=0):
                if (stretch := _stretch(folder, sha256)) is None:
                    console.print(
                        f"{name}: fewer than two {'checkpoints' if sha256 else 'states'} are stored. In the run that "
                        "makes it, set runtime.keep_finished_checkpoints=true and checkpoint_every below "
                        f"{'half ' if sha256 else ''}the number of steps; what a table's seeds share is stored with "
                        "the seed that made it",
                        soft_wrap=True,
                    )
                    continue
                results.append(_same(folder.parents[1], folder, name, recipe, stretch, first=not results))
        except Timeout:
            console.print(f"{name}: another run is making it right now", soft_wrap=True)
        except UserError as error:
            # the other stages are still of use
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    if stage and not seen:
        kinds = ", ".join(kind for kind, one in STAGES.items() if one.trains)
        raise UserError(f"{workdir}: no stage {stage} of this version: give {kinds}, or a folder's name")
    if not results:
        what = f"stage {stage}" if stage else "stage"
        raise UserError(f"{workdir}: no {what} with two stored states to compare")
    return all(results)


def _stage_folders(workdir: Path) -> list[Path]:
    """The folders of the stages, unfinished ones included."""
    folders = [path for path in sorted((workdir / "stages").glob("*")) if is_stage_folder(path)]
    # an unfinished one may have logged nothing yet
    begun = (RECIPE, METRICS)
    return [path for path in folders if path.name[0] != "." or all((path / name).is_file() for name in begun)]


def _trained(folder: Path, name: str, stage: str | None) -> dict[str, Any] | None:
    """The recipe of a training stage; None for another stage, for one that is not asked for, and of another format.

    Args:
      name: the stage's, which an unfinished stage's folder has not.
    """
    kind = name.partition("-")[0]
    if kind not in STAGES or not STAGES[kind].trains or stage not in (None, kind, folder.name, name):
        return None
    made = read_recipe(folder)
    recipe = {key: made.get(key) for key in ("format", "stage", "settings", "inputs", "parents")}
    if made.get("format") != FORMAT:
        return None
    if artifact_name(recipe) != name:
        raise Damaged(folder, "has another name than its recipe gives", anew(folder))
    return recipe


def _stretch(folder: Path, sha256: bool) -> Stretch | None:
    """The steps between the last two checkpoints, or from the only checkpoint to the next recorded hash."""
    if not (folder / "checkpoints").is_dir():
        return None
    recorded = _recorded(folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    try:
        steps = checkpoints.steps()
        if len(steps) > 1:
            start, end = steps[-2:]
            record = checkpoints.record(end)
            if sha256 or record.get("hash") != LANES:
                leaves = checkpoints.sha256(end)
                return Stretch(start, end, state_hash(leaves), leaves, True)
            leaves = record["hashes"]
            return Stretch(start, end, recorded.get(end, state_hash(leaves)), leaves)
        if sha256 or not steps or checkpoints.record(steps[0]).get("hash") != LANES:
            return None
        later = [step for step in recorded if step > steps[0]]
        return Stretch(steps[0], min(later), recorded[min(later)], None) if later else None
    except UserError:
        raise
    except Exception as error:  # Orbax has errors of its own for each kind of damage
        reason = (str(error).splitlines() or [""])[0][:120]
        what = f"cannot be read ({type(error).__name__}: {reason})"
        raise Damaged(folder / "checkpoints", what, KEPT_FOR_VERIFY) from error
    finally:
        checkpoints.close()


def _recorded(folder: Path) -> dict[int, str]:
    """State hashes by step; of an unfinished stage up to the first incomplete line (left by a kill)."""
    if not (folder / RECIPE).is_file():
        rows = read_metrics(folder)
    else:
        rows = []
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(loads(line))
            except ValueError:
                break
    hashes = {row["step"]: row["state_hash"] for row in rows if "state_hash" in row}
    if wrong := [step for step, found in hashes.items() if not isinstance(found, str)]:
        raise Damaged(folder / METRICS, f"has no text for the hash of step {wrong[0]}", anew(folder))
    return hashes


def _same(workdir: Path, folder: Path, name: str, recipe: Mapping[str, Any], stretch: Stretch, *, first: bool) -> bool:
    """Retrains the steps in a scratch folder; prints and returns whether the final state is as recorded."""
    config = read_config(folder / CONFIG)
    single = config.runtime.model_copy(update={"processes": ProcessesConfig(), "bucket": None, "wandb": None})
    config = config.model_copy(update={"workdir": str(workdir), "runtime": single})
    if first:
        machine.start(config.runtime)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=workdir) as scratch, STOPS.removing(Path(scratch)):
        found = _train_again(config, workdir, folder, Path(scratch), recipe, stretch)
    hash_of = "sha256" if stretch.sha256 else "state_hash"
    if state_hash(found) == stretch.expected:
        steps = f"steps {stretch.start} to {stretch.end}"
        console.print(f"{name}: {steps} identical ({hash_of} {stretch.expected[:12]})", soft_wrap=True)
        return True
    if changed := _changed(config, recipe):
        raise UserError(f"{folder}: {changed} changed since it was trained, and it cannot be trained again as it was")
    leaf = first_difference(stretch.leaves, found) if stretch.leaves else None
    what = f"the first leaf that differs is {leaf}" if leaf else "which leaf differs is not recorded"
    if stretch.leaves and not leaf:
        what = "the stored checkpoint equals this run's bit for bit, so the recorded hash is wrong"
    console.print(
        f"{name}: steps {stretch.start} to {stretch.end} differ: {hash_of} {stretch.expected[:12]} was recorded and "
        f"is {state_hash(found)[:12]} now; {what}",
        soft_wrap=True,
    )
    return False


def _changed(config: Config, recipe: Mapping[str, Any]) -> str:
    """The inputs of a stage that are others now than when it was trained; a stage may declare more than it reads."""
    now, then = Inputs(config).only(STAGES[recipe["stage"]].inputs).fingerprints, recipe["inputs"]
    return ", ".join(INPUT_NAMES[name] for name in sorted({*now, *then}) if now.get(name) != then.get(name))


def _train_again(
    config: Config, workdir: Path, folder: Path, scratch: Path, recipe: Mapping[str, Any], stretch: Stretch
) -> dict[str, str]:
    """Hashes of the state's leaves after retraining the steps.

    Raises:
      UserError: if the checkpoint or a parent is not there any more as it was.
    """
    stage = STAGES[recipe["stage"]]
    place = Path("checkpoints") / str(stretch.start)
    shutil.copytree(folder / place, scratch / place)
    write_json(scratch / RECIPE, recipe)
    parents = {}
    for role, parent in recipe["parents"].items():
        path = workdir / "stages" / parent
        if not path.is_dir():
            raise UserError(f"{folder}: its {role} {path} is missing; without it the stage cannot be retrained")
        if is_removed(path):
            raise UserError(
                f"{folder}: the model of its {role} {path} was removed (runtime.keep=last), and without it the stage "
                f"cannot be retrained: mpo {parent.partition('-')[0]} CONFIG makes it again"
            )
        parents[role] = Artifact(path, read_manifest(path))
    mesh = make_mesh(config.mesh)
    settings = stage.Settings.model_validate(recipe["settings"])
    try:
        with jax.set_mesh(mesh), stopping_at(stretch.end):
            stage.run(settings, parents, stage_context(config, stage, mesh, scratch, Inputs(config), recipe))
    except Preempted:
        pass
    except CheckpointsLost:
        raise Damaged(folder / place, "cannot be read (only a copy of it was removed)", KEPT_FOR_VERIFY) from None
    checkpoints = Checkpoints(scratch / "checkpoints", keep=1)
    try:
        if stretch.end not in checkpoints.steps():
            raise UserError(f"{folder / METRICS} has a hash of step {stretch.end}, which training does not come to")
        return checkpoints.sha256(stretch.end) if stretch.sha256 else checkpoints.record(stretch.end)["hashes"]
    finally:
        checkpoints.close()
