"""Any model that can be read here, written as a Hugging Face folder."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh
from safetensors import SafetensorError

from mpo_jax.config.schema import Config
from mpo_jax.data.base_model import fingerprint_base
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families, peft, peft_config, weights
from mpo_jax.models.hf.found import is_scored_at_end
from mpo_jax.models.hf.hub import is_hub_id, on_this_machine
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline.recipe import read_recipe
from mpo_jax.runtime import machine
from mpo_jax.runtime.files import remove
from mpo_jax.runtime.outputs import check_output_folder
from mpo_jax.runtime.processes import agree, is_main, wait
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.tools.opening import find_model
from mpo_jax.tools.report.card import ADAPTER, trained_config, write_card
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.types import Head, Tree, frozen
from mpo_jax.untrusted import reason

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      source: what the model was read from.
      kind: language model or reward model.
      dtype: of the weights.
      num_bytes: of all files.
      base: of adapters, the model that they change.
      base_missing: whether that is a path and nothing is there.
    """

    source: str
    family: str
    kind: str
    dtype: str
    num_bytes: int
    base: str | None = None
    base_missing: bool = False


def export(
    path: str,
    target: Path,
    config: Config,
    *,
    critic: bool = False,
    dtype: Dtype | None = None,
    adapter: bool = False,
) -> Exported:
    """Writes `target` with a model card, whole or not at all.

    Args:
      path: a run's or stage's folder, a model folder, a .gguf file, a hub id; or an unfinished stage's hidden folder,
        whose newest checkpoint is taken.
      critic: PPO's critic instead of its policy.
      dtype: of the weights; None: as stored, and float32 for a checkpoint or a .gguf file.
      adapter: write the adapters alone, as a PEFT folder, instead of the model with the adapters folded in.

    Raises:
      UserError: if there is no model, or `target` exists and is not empty; or if there are no adapters, as of a critic.
    """
    machine.start(config.runtime)
    if target.is_symlink():
        raise UserError(f"{target} is a link, which is left alone: name a new folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: name a new folder")
    found = find_model(path, critic=critic)
    if is_main():
        check_output_folder("DIR", target)
    if adapter:
        if critic:
            raise UserError(
                "--critic and --adapter together: PPO saves its critic as a whole model, so export it without --adapter"
            )
        if dtype not in (None, "float32"):
            raise UserError(f"--dtype {dtype} and --adapter together: adapters are written in float32, as they train")
        return _export_adapter(path, found, target, config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(found)
        num_ids = TextCodec(tokenizer, config.text).vocab_size
        decoder, tree, where, written_as = _read(found, mesh, dtype, config, critic=critic, num_ids=num_ids)
        with _writing(target):
            partial = _begin(target)
            at_end = is_scored_at_end(found)
            loading.save(partial, Model(decoder), frozen(tree), tokenizer, dtype=written_as, scored_at_end=at_end)
    kind = "reward model" if "score" in tree else "language model"
    with _writing(target):
        written = _finish(partial, target, found, path, kind=kind, dtype=written_as)
    return Exported(where, decoder.family, kind, written_as, written)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Names the folder in an error of the disk, and removes what is half written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_partial(target), ignore_errors=True)
        raise UserError(
            f"cannot write {target}: {reason(error)}. Nothing is left there: free space, or name a folder in which you "
            "may write"
        ) from error
    except UserError as error:
        shutil.rmtree(_partial(target), ignore_errors=True)
        raise UserError(f"{target} is not written: {error}") from error


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _begin(target: Path) -> Path:
    """The folder that becomes `target` once it is whole."""
    partial = _partial(target)
    if is_main():
        remove(partial)  # also a link that somebody has put there
        target.parent.mkdir(parents=True, exist_ok=True)
    return partial


def _finish(
    partial: Path, target: Path, found: Path, path: str, *, kind: str, dtype: str, base: str | None = None
) -> int:
    """Adds the card, gives the folder its name, and returns the bytes of its files."""
    if is_main():
        write_card(partial, found, path, name=target.name, kind=kind, dtype=dtype, base=base)
        if target.is_dir():
            target.rmdir()
        os.rename(partial, target)
    written = sum(file.stat().st_size for file in target.iterdir()) if is_main() else 0
    return agree(written, f"process 0 writes {target.name}")


def _export_adapter(path: str, found: Path, target: Path, config: Config) -> Exported:
    """Writes a PEFT folder: that of a finished stage, or the newest checkpoint's adapters."""
    folder = found if peft_config.is_adapter(found) else found.parent / loading.ADAPTER
    if not (folder / peft_config.CONFIG).is_file():
        raise UserError(f"{path} has no adapters: it was trained whole (model.adapter), so export it without --adapter")
    settings, partial, where = peft_config.read_settings(folder), _begin(target), str(folder)
    if folder == found:
        source = loading.open_model(found)
        head, decoder = source.head, source.decoder
    else:
        head, decoder = families.read_head(found), families.read_config(found)
    local = on_this_machine(settings.base)
    # absolute, for use from other folders
    base = settings.base if local is None else str(local.resolve())
    if is_main():
        shutil.copytree(folder, partial)
        peft_config.rename_base(partial, base)
    wait(f"process 0 copies {folder}")
    if not (folder / peft.WEIGHTS).is_file():
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            step, trained = _newest_adapters(found, Model(decoder, adapter=settings.adapter(decoder)), head, mesh)
            peft.save_weights(partial, trained, decoder)
        where = f"step {step} of the unfinished {found.parent.name}"
    kind = "reward model" if head == "value" else "language model"
    written = _finish(partial, target, found, path, kind=f"{ADAPTER}{kind}", dtype="float32", base=base)
    missing = local is None and not is_hub_id(base)
    return Exported(where, f"adapters of a {decoder.family}", kind, "float32", written, base, missing)


def _newest_adapters(found: Path, model: Model, head: Head, mesh: Mesh) -> tuple[int, Tree]:
    """The step and the trained part of an unfinished stage's newest checkpoint."""
    shapes = forward.abstract_split(model, head=head)["trainable"]
    manager = Checkpoints(found.parent / "checkpoints", keep=1)
    step, trained = manager.restore_params(shapes, forward.param_shardings(shapes, mesh), critic=False)
    manager.close()
    return step, trained


def _read(
    found: Path, mesh: Mesh, dtype: str | None, config: Config, *, critic: bool, num_ids: int
) -> tuple[DecoderConfig, Tree, str, str]:
    """Sizes, parameters, what they are and the type to write, of a model or an unfinished stage's newest checkpoint."""
    checkpoints = found.parent / "checkpoints"
    if checkpoints.is_dir() and not any(found.glob("*.safetensors")):
        decoder = families.read_config(found)
        if (found.parent / loading.ADAPTER / peft_config.CONFIG).is_file():
            cache = config.runtime.fingerprint_cache_folder
            return _folded(found, decoder, mesh, dtype or "float32", critic=critic, num_ids=num_ids, cache=cache)
        shapes = forward.abstract_params(decoder, head=families.read_head(found))
        manager = Checkpoints(checkpoints, keep=1)
        step, tree = manager.restore_params(shapes, forward.param_shardings(shapes, mesh), critic=critic)
        manager.close()
        return decoder, tree, f"step {step} of the unfinished {found.parent.name}", dtype or "float32"
    source = loading.open_model(found, label=config.reward.label).fitting(num_ids)
    source.say_notes()
    dtype = dtype or source.tensors.dtype
    # stored in the type to be written, so that the machine never holds a larger copy
    tree = weights.load_params(source.tensors, source.decoder, mesh, head=source.head, dtype=dtype)
    return source.decoder, tree, str(found), dtype


def _check_unchanged(base: Path, stage: Path, cache: Path | None) -> None:
    """Raises UserError where a base model from elsewhere is not the one that an unfinished stage adapts any more."""
    recipe = read_recipe(stage)
    wanted = None if (base.parent / "manifest.json").is_file() else recipe["inputs"].get("base")
    if wanted is not None and fingerprint_base(str(base), cache) != wanted:
        raise UserError(
            f"{base} has changed since {stage.name} began, and its adapters belong to the model that it was: put that "
            "back, or export the adapters alone (--adapter)"
        )


def _folded(
    found: Path, decoder: DecoderConfig, mesh: Mesh, dtype: str, *, critic: bool, num_ids: int, cache: Path | None
) -> tuple[DecoderConfig, Tree, str, str]:
    """As `_read`, of an unfinished stage that trains adapters: its base with the newest ones folded in.

    Args:
      cache: folder of files' digests from earlier runs.
    """
    if critic:
        raise UserError(
            f"{found.parent}: the critic of an unfinished stage with adapters cannot be exported: finish it"
        )
    settings, head = peft_config.read_settings(found.parent / loading.ADAPTER), families.read_head(found)
    model = Model(decoder, dtype=dtype, adapter=settings.adapter(decoder))
    step, trained = _newest_adapters(found, model, head, mesh)
    path = peft_config.base_of(found.parent / loading.ADAPTER)
    _check_unchanged(path, found.parent, cache)
    base = loading.open_model(path).fitting(num_ids)
    trained_as = trained_config(found)
    # adapters belong to the very weights that they were trained on, rounded as these were
    quantise = trained_as is not None and trained_as.model.frozen_dtype == "int8"
    tree = weights.load_params(base.tensors, decoder, mesh, head=base.head, dtype=dtype, quantise=quantise)
    rest = {name: tree[name] for name in forward.abstract_split(model, head=head)["frozen"]}
    whole = loading.whole(model, {"trainable": trained, "frozen": rest})
    return decoder, whole, f"step {step} of the unfinished {found.parent.name}", dtype
