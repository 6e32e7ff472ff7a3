"""The method's stages by name, and their settings, contexts and shapes under a configuration."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mpo_jax.config.load import to_yaml
from mpo_jax.config.registry import Step
from mpo_jax.config.schema import Config
from mpo_jax.data.corpus import Corpus, base_tokenizer
from mpo_jax.data.lengths import Lengths
from mpo_jax.data.reward_codec import RewardCodec
from mpo_jax.data.text import TextCodec
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline.bucket import Bucket, checkpoint_folder, stage_place
from mpo_jax.pipeline.recipe import artifact_name
from mpo_jax.runtime import machine, parts
from mpo_jax.runtime.compilation import Compilations
from mpo_jax.runtime.offload import Offload
from mpo_jax.runtime.processes import is_main, wait
from mpo_jax.stages import dpo, evaluate, ppo, reward, select, sft
from mpo_jax.stages.compiling import Upcoming
from mpo_jax.stages.context import Context, Inputs
from mpo_jax.stages.settings import Split, Watch, adapter_of
from mpo_jax.stages.shapes import Amounts, Set, Shapes, TextRewards
from mpo_jax.stages.stage import Stage
from mpo_jax.training.tracker import Sink
from mpo_jax.training.wandb_log import stage_run
from mpo_jax.types import Artifact

STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (sft.STAGE, reward.STAGE, select.STAGE, dpo.STAGE, ppo.STAGE, evaluate.STAGE)
}
"""The stages by name, in the order of the method."""

PLANNED = Step("ppo", "hard")
"""The step used for settings when no experiment is named; program shapes do not depend on the step."""


def stage_settings(name: str, config: Config, step: Step = PLANNED) -> Any:
    """A stage's settings under a configuration.

    Args:
      step: step of a DPO or PPO stage: which pairs or prompts it learns from.
    """
    if name in ("dpo", "ppo"):
        split = Split.of(step.subset, config.select, selected=step.needs_selection)
        return (dpo if name == "dpo" else ppo).Settings.of(config, split)
    settings: Any = STAGES[name].Settings
    return settings.of(config)


def stage_context(
    config: Config,
    stage: Stage,
    mesh: Mesh,
    folder: Path,
    inputs: Inputs,
    recipe: Mapping[str, Any],
    upcoming: Upcoming | None = None,
    parents: Mapping[str, Artifact] | None = None,
) -> Context:
    """Where and how a stage runs under a configuration; a stage that trains gets a copy of it in `folder`.

    Args:
      folder: folder in which the stage is made.
      upcoming: what the stage will compile; None: nothing is said of it.
    """
    runtime, bucket, watch = config.runtime, Bucket.of(config), Watch()
    if stage.trains:
        watch = Watch.of(getattr(config, stage.name).train)
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    def send() -> None:
        if bucket is None or not bucket.takes_checkpoints:
            return
        if is_main():
            # before the checkpoint, so that a checkpoint in the bucket always has all its metrics
            bucket.send(folder, stage_place(folder))
        # else the others would wait for process 0 in the collectives of the checkpoint
        wait(f"process 0 sends the metrics of {folder.name}")

    def send_parts(place: Path, files: Sequence[Path]) -> None:
        assert bucket is not None
        # before the parts, so that their rows' metrics are there
        bucket.send(folder, stage_place(folder))
        inside = place.relative_to(folder).as_posix()
        bucket.send(place, f"{stage_place(folder)}/{inside}", files=files, last=parts.MANIFEST)

    # what a bucket holds of a stage replaces the workdir's folder of it, and with that checkpoints it does not hold
    sends_parts = bucket is not None and (bucket.takes_checkpoints or not stage.trains)

    def sinks() -> Sequence[Sink]:
        run = stage_run(config, folder, stage.name, artifact_name(recipe))
        return () if run is None else (run,)

    return Context(
        mesh=mesh,
        folder=folder,
        inputs=inputs.only(stage.inputs),
        watch=watch,
        remat=config.model.remat,
        logit_chunk=config.model.logit_chunk,
        offload=Offload.of(runtime, mesh),
        token_cache=runtime.token_cache_folder,
        tensorboard=runtime.tensorboard,
        checkpoints=checkpoint_folder(bucket, folder),
        before_save=send,
        save_minutes=runtime.save_minutes,
        send_parts=send_parts if sends_parts else None,
        recipe=recipe,
        sinks=sinks,
        upcoming=upcoming,
        parents={role: _measured(parent) for role, parent in (parents or {}).items()},
    )


def upcoming_programs(
    name: str, config: Config, mesh: Mesh, settings: Any, parents: Mapping[str, str], compilations: Compilations
) -> Upcoming:
    """What a stage will compile under a configuration.

    Args:
      parents: the artifacts that the stage reads, by role.
    """

    def shapes(model: Model) -> Shapes:
        rewards = text_rewards(config, mesh)
        made = stage_shapes(name, config, model.decoder, mesh, parents=parents, text_rewards=rewards)
        # the very model whose functions the stage calls
        return dataclasses.replace(made, model=model)

    return Upcoming(partial(STAGES[name].programs, settings), shapes, compilations, config.runtime.compile_threads)


def _measured(parent: Artifact) -> str:
    """A hash of what a parent's making has measured: other bits measure other numbers."""
    return hashlib.sha256(json.dumps(parent.manifest.get("summary"), sort_keys=True).encode()).hexdigest()


def stage_shapes(
    name: str,
    config: Config,
    decoder: DecoderConfig,
    mesh: Mesh,
    *,
    amounts: Amounts | None = None,
    parents: Mapping[str, str] | None = None,
    text_rewards: TextRewards | None = None,
) -> Shapes:
    """The shapes that a stage's programs are compiled with under a configuration.

    Args:
      amounts: numbers of rows; None if no data was read.
      parents: the artifacts that the stage reads, by role; None: all its roles, and PPO starts from its reference.
      text_rewards: as `text_rewards` finds it.
    """
    loading.check_positions(decoder, config.text)
    stage, adapted = STAGES[name], adapter_of(name, config)
    own_reference = parents is not None and parents.get("reference") != parents.get("init")
    adapter = None if adapted is None else loading.make_adapter(adapted, decoder)
    return Shapes(
        model=loading.Options.of(config.model).model(decoder, mesh, adapter),
        mesh=mesh,
        text=config.text,
        frozen_dtype=machine.frozen_dtype(config.model),
        amounts=amounts,
        watch=Watch.of(getattr(config, name).train) if stage.trains else Watch(),
        offload_frozen=config.runtime.offload_frozen,
        offload_moments=config.runtime.offload_moments,
        own_reference=own_reference,
        text_rewards=text_rewards,
        parents=frozenset(stage.parents if parents is None else parents),
    )


def text_rewards(config: Config, mesh: Mesh, *, fetch: bool = True) -> TextRewards | None:
    """What scores responses as text under a configuration; None if a reward model of the policy's tokens does.

    Args:
      fetch: whether models on the hub are fetched; otherwise, where one is not here, None.

    Raises:
      UserError: if the finished reward model cannot be opened.
    """
    if config.reward.function is not None:
        return TextRewards()
    own = _own_codec(config, fetch=fetch)
    if own is None:
        return None
    path = str(config.reward.path)
    decoder = loading.open_model(path, label=config.reward.label).fitting(own.vocab_size).decoder
    return TextRewards(loading.Options.of(config.model).model(decoder, mesh), own.max_tokens)


def scores_text(config: Config, *, fetch: bool = True) -> bool:
    """Whether there are `text_rewards`; PPO's critic then has the policy's sizes."""
    return config.reward.function is not None or _own_codec(config, fetch=fetch) is not None


def _own_codec(config: Config, *, fetch: bool) -> RewardCodec | None:
    path = config.reward.path
    here = all(given is None or Path(given).expanduser().exists() for given in (path, config.model.path))
    if path is None or not (fetch or here):
        return None
    codec = TextCodec(base_tokenizer(config), config.text)
    return reward.check_finished(path, codec, config.reward.label)


def count_rows(config: Config, corpus: Corpus, codec: TextCodec | None = None) -> Amounts:
    """The number of rows of each stage under a configuration.

    Args:
      codec: tokenizes a sample of the rows for their lengths; None: rows are counted at full width.
    """
    prompts = len(corpus.sampled_prompts(config.select.num_prompts))
    human_pairs = len(corpus.human_pairs(config.select.num_prompts))
    return Amounts(
        demonstrations=len(corpus.demonstrations),
        reward_pairs=len(corpus.reward_pairs),
        reward_watched=len(corpus.validation or corpus.held_out),
        reward_test=len(corpus.reward_test),
        held_out=len(corpus.held_out),
        prompts=prompts,
        human_pairs=human_pairs,
        selected=prompts if config.select.pair_source == "sampled" else human_pairs,
        test_prompts=len(corpus.test_prompts),
        lengths={} if codec is None else _lengths(codec, corpus),
    )


def _lengths(codec: TextCodec, corpus: Corpus) -> dict[Set, Lengths]:
    """The lengths of each set that has rows."""
    sets: dict[Set, Any] = {
        "demonstrations": [(row.prompt, (row.response,)) for row in corpus.demonstrations],
        "pairs": [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs],
        "prompts": [(prompt, ()) for prompt in corpus.prompts],
        "test_prompts": [(prompt, ()) for prompt in corpus.test_prompts],
    }
    measured: dict[Set, Lengths] = {}
    for name, rows in sets.items():
        if (lengths := Lengths.of(codec, rows)) is not None:
            measured[name] = lengths
    return measured
