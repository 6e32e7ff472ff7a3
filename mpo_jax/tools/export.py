"""Any model that can be read here, written as a Hugging Face folder."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from mpo_jax.config.schema import Config
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families, weights
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime import machine
from mpo_jax.runtime.processes import agree, is_main
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.tools.opening import find_model
from mpo_jax.tools.report.card import write_card
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.types import Tree, frozen

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      source: what the model was read from.
      kind: language model or reward model.
      dtype: of the weights.
      num_bytes: of all files.
    """

    source: str
    family: str
    kind: str
    dtype: str
    num_bytes: int


def export(path: str, target: Path, config: Config, *, critic: bool = False, dtype: Dtype | None = None) -> Exported:
    """Writes `target` with a model card, whole or not at all.

    Args:
      path: a run's or stage's folder, a model folder, a .gguf file, a hub id; or an unfinished stage's hidden folder,
        whose newest checkpoint is taken.
      critic: PPO's critic instead of its policy.
      dtype: of the weights; None: as stored, and float32 for a checkpoint or a .gguf file.

    Raises:
      UserError: if there is no model, or `target` exists and is not empty.
    """
    machine.start(config.runtime)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: name a new folder")
    found = find_model(path, critic=critic)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(found)
        num_ids = TextCodec(tokenizer, config.text).vocab_size
        decoder, tree, where, written_as = _read(
            found, mesh, dtype, critic=critic, num_ids=num_ids, label=config.reward.label
        )
        partial = target.with_name(f".{target.name}.partial")
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
        loading.save(partial, Model(decoder), frozen(tree), tokenizer, dtype=written_as)
    kind = "reward model" if "score" in tree else "language model"
    if is_main():
        write_card(partial, found, path, name=target.name, kind=kind, dtype=written_as)
        if target.is_dir():
            target.rmdir()
        os.rename(partial, target)
    written = sum(file.stat().st_size for file in target.iterdir()) if is_main() else 0
    return Exported(where, decoder.family, kind, written_as, agree(written, f"process 0 writes {target.name}"))


def _read(
    found: Path, mesh: Mesh, dtype: str | None, *, critic: bool, num_ids: int, label: str | None
) -> tuple[DecoderConfig, Tree, str, str]:
    """Sizes, parameters, what they are and the type to write, of a model or an unfinished stage's newest checkpoint."""
    checkpoints = found.parent / "checkpoints"
    if checkpoints.is_dir() and not any(found.glob("*.safetensors")):
        decoder = families.read_config(found)
        shapes = forward.abstract_params(decoder, head=families.read_head(found))
        manager = Checkpoints(checkpoints, keep=1)
        step, tree = manager.restore_params(shapes, forward.param_shardings(shapes, mesh), critic=critic)
        manager.close()
        return decoder, tree, f"step {step} of the unfinished {found.parent.name}", dtype or "float32"
    source = loading.open_model(found, label=label).fitting(num_ids)
    source.say_notes()
    dtype = dtype or source.tensors.dtype
    # stored in the type to be written, so that the machine never holds a larger copy
    tree = weights.load_params(source.tensors, source.decoder, mesh, head=source.head, dtype=dtype)
    return source.decoder, tree, str(found), dtype
