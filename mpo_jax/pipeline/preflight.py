"""What a run needs besides its stages, checked before the first of them starts: models, rows, batches, host memory."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mpo_jax.config.schema import Config
from mpo_jax.data.corpus import base_tokenizer, check_first_rows
from mpo_jax.data.scored import check_scores
from mpo_jax.data.text import TextCodec
from mpo_jax.data.text_rows import TextRow
from mpo_jax.errors import UserError
from mpo_jax.evaluation.reward_function import load_function
from mpo_jax.models import loading
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline.bucket import Bucket
from mpo_jax.pipeline.disk import check_models_fit
from mpo_jax.pipeline.experiments import needs_reward, needs_selection
from mpo_jax.pipeline.pipeline import Pipeline, StageName
from mpo_jax.pipeline.stages import STAGES, stage_shapes, text_rewards
from mpo_jax.pipeline.table import Listing
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.offload import Offload, check_pinned
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.stages import ppo, reward

CHECKED = "all processes check their inputs"
"""What processes wait for before the first stage: what one of them cannot open stops all of them."""
FINISHED = ("stages/*/manifest.json", "seed-*/stages/*/manifest.json")
"""Patterns of what a finished stage leaves in a workdir, also in that of a table's seed."""


def check_fresh(config: Config, until: StageName = "evaluate") -> bool:
    """Checks the inputs if the workdir holds no finished stage yet; returns whether it did.

    To name stages means to hash the models' files, which takes longer than this check. Where stages are finished, all
    of them may be: then there is nothing to check, and `check_missing` knows.
    """
    if any(next(Path(config.workdir).glob(pattern), None) for pattern in FINISHED):
        return False
    check_inputs(config, until)
    return True


def check_inputs(config: Config, until: StageName = "evaluate") -> None:
    """Opens everything that the configuration names by a path, reading headers and first rows alone.

    It takes seconds, also for models of 7B parameters, and leaves out what no stage up to `until` reads.

    Raises:
      UserError: names the key that is wrong.
    """
    if until != "sft" and config.data.kind != "toy" and not config.data.path:
        raise UserError(
            f"mpo {until} needs pairs: name their files, data.path (data.sft_path alone is enough for mpo sft)"
        )
    row = check_first_rows(config)
    if not config.select.scores_pairs:
        check_scores(config.data)
    elif (
        config.data.kind == "scored"
        and not config.given.has("select.pair_source")
        and any(needs_selection(name, until) for name in config.experiment)
    ):
        console.print(
            "[yellow]data.kind=scored: the scores only say which response is chosen; pairs to select from are sampled. "
            "select.pair_source=scored selects by the scores, without sampling or a reward model[/yellow]",
            soft_wrap=True,
        )
    codec, _ = check_base(config)
    if config.model.path is None and config.model.adapter is not None:
        console.print("model.adapter: SFT trains its model whole, from random weights; later stages train adapters")
    if any(needs_reward(name, until, config.select) for name in config.experiment):
        check_reward(config, codec, row)


def check_base(config: Config) -> tuple[TextCodec, DecoderConfig]:
    """The base model's tokenizer and sizes, checked to belong together and to have room for the texts.

    Raises:
      UserError: if there is no such model, it is no language model or not supported, or the texts are too long for it.
    """
    path = config.model.path
    if path is None:
        codec = TextCodec(base_tokenizer(config), config.text)
        decoder = loading.scratch_sizes(config.model.architecture, codec.vocab_size)
        loading.check_positions(decoder, config.text)
        return codec, decoder
    with loading.naming("model.path", path):
        source = loading.open_model(path)
        codec = TextCodec(base_tokenizer(config), config.text)
        loading.check_source(source, codec.vocab_size, config.text, head="lm")
        decoder = source.fitting(codec.vocab_size).decoder
    if config.model.adapter is not None:
        loading.make_adapter(config.model.adapter, decoder)
    return codec, decoder


def check_reward(config: Config, codec: TextCodec, row: TextRow | None) -> None:
    """Checks what `reward.path` or `reward.function` names, if there is one, on a row of the data.

    Args:
      codec: the policy's.
      row: a response of the data; None if the first rows have none.

    Raises:
      UserError: if it cannot score the policy's responses.
    """
    _say_unused(config)
    rows = [] if row is None else [row]
    if config.reward.path is not None:
        own = reward.check_finished(config.reward.path, codec, config.reward.label)
        if own is not None:
            own.examples(rows)
    if config.reward.function is not None:
        function = load_function(config.reward.function)
        if rows:
            function(rows)


def _say_unused(config: Config) -> None:
    """Names settings of the reward model that the user has made and nothing reads."""
    given, unused = config.given, {}
    if config.reward.path is None:
        unused["without reward.path"] = given.without_effect("reward.label", None)
    if not config.reward.trains:
        source = "reward.path" if config.reward.path is not None else "reward.function"
        keys = [key for name in ("init", "loss", "train") for key in given.without_effect(f"reward.{name}", source)]
        # the batch size counts for a reward that is not trained here, too
        unused[f"since {source} is given"] = [key for key in keys if key != "reward.train.batch_size"]
    for why, keys in unused.items():
        if keys:
            console.print(f"[yellow]{', '.join(keys)}: no effect {why}[/yellow]", soft_wrap=True)


def check_missing(
    pipeline: Pipeline, names: Iterable[str], until: StageName = "evaluate", *, inputs_checked: bool
) -> None:
    """Checks the stages that have to be made for the runs; where none is missing, nothing.

    Args:
      inputs_checked: what `check_fresh` has returned.

    Raises:
      UserError: if a stage cannot run here, or a run has nothing to be evaluated on.
    """
    config, listing = pipeline.config, copy.copy(pipeline)
    listing.store = Listing(Path(config.workdir), Bucket.of(config))
    named = (listing.experiment(name, until=until).artifacts.values() for name in names)
    missing = {made.id: made.manifest for artifacts in named for made in artifacts if "seconds" not in made.manifest}
    check_stages(config, missing.values(), until, inputs_checked=inputs_checked)


def check_stages(
    config: Config, recipes: Iterable[Mapping[str, Any]], until: StageName = "evaluate", *, inputs_checked: bool
) -> None:
    """Checks stages that are going to be made: what they read, their models against the disk, their batches against the
    mesh, and offloading against the host's memory.

    Raises:
      UserError: if an input is wrong, a batch does not divide over the mesh, there are too few devices, or the disk or
        the host's memory is too small.
    """
    recipes = list(recipes)
    if not recipes:
        return
    if not inputs_checked:
        check_inputs(config, until)
    check_models_fit(config, recipes, check_base(config)[1])
    mesh = make_mesh(config.mesh)
    offload = Offload.of(config.runtime, mesh)
    for recipe in recipes:
        stage = STAGES[recipe["stage"]]
        settings = stage.Settings.model_validate(recipe["settings"])
        stage.check(settings, mesh)
        if stage.name == "ppo" and (offload.frozen or offload.moments):
            _check_host_memory(config, settings, offload, mesh)


def _check_host_memory(config: Config, settings: Any, offload: Offload, mesh: Mesh) -> None:
    rewards = text_rewards(config, mesh)
    shapes = stage_shapes("ppo", config, check_base(config)[1], mesh, text_rewards=rewards)
    frozen, moments = ppo.offloaded(settings, shapes)
    needed = offload.pinned_bytes(frozen=frozen, moments=moments, num_devices=len(mesh.local_devices))
    try:
        check_pinned(needed, machine.host_memory(), jax.default_backend(), os.environ)
    except UserError as error:
        keys = " and ".join(f"runtime.offload_{key}=true" for key in ("frozen", "moments") if getattr(offload, key))
        raise UserError(f"{keys}: {error}") from error
