"""The stages of `mpo table` without making any: their order, what is there already, and how long the rest will take."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mpo_jax.config.schema import Config, TrainConfig
from mpo_jax.data.batches import num_steps
from mpo_jax.data.corpus import Corpus, base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.models import flops, loading
from mpo_jax.models.flops import Rows, Work
from mpo_jax.pipeline.artifacts import artifact_name, make_recipe
from mpo_jax.pipeline.bucket import Bucket, stage_place
from mpo_jax.pipeline.experiments import table_variants
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.runtime import machine
from mpo_jax.runtime.progress import Expected
from mpo_jax.runtime.timing import time_matmul
from mpo_jax.types import Artifact

SHARE_OF_PEAK = 0.3
"""Of the speed of a large matrix product, what a stage reaches: within a factor of two to three for most sizes."""
FIXED_SECONDS = 4.0
"""Reading, compiling and writing of a stage, whatever its size."""
DECODING_COST = 4.0
"""How many times longer an operation takes where tokens are drawn one after the other."""
UNKNOWN_EASY_SHARE = 0.5
"""Of pairs that are not selected yet, at a threshold."""


@dataclasses.dataclass
class Planned:
    """One stage of the table.

    Attributes:
      seed: of the runs that use it; no stage is shared by two seeds.
      name: its folder's name.
      recipe: what it is made from.
      role: the run and the role under which it first appears: the same for its twins of other seeds.
      runs: all runs of its seed that use it.
      seconds: what it took, if it is there already.
    """

    seed: int
    name: str
    recipe: Mapping[str, Any]
    role: tuple[str, str]
    runs: list[str]
    seconds: float | None

    @property
    def kind(self) -> str:
        return self.recipe["stage"]

    @property
    def is_there(self) -> bool:
        return self.seconds is not None


class Listing:
    """A store that makes nothing: it names what would be made and opens what there is."""

    makes = False

    def __init__(self, workdir: Path, bucket: Bucket | None = None):
        self.folder, self._bucket = workdir / "stages", bucket

    def build(
        self,
        stage: str,
        settings: Mapping[str, Any],
        parents: Mapping[str, Artifact],
        run: Callable[[Path], Mapping[str, Any]],
    ) -> Artifact:
        recipe = make_recipe(stage, settings, parents)
        path = self.folder / artifact_name(recipe)
        finished = path / "manifest.json"
        if finished.is_file():
            return Artifact(path, json.loads(finished.read_text(encoding="utf-8")))
        there = None if self._bucket is None else self._bucket.read(f"{stage_place(path)}/manifest.json")
        return Artifact(path, there or recipe)


def seed_config(config: Config, seed: int) -> Config:
    """The configuration of one seed of a table, in `<workdir>/seed-N`; the toy world is another one for every seed."""
    toy = config.data.toy.model_copy(update={"seed": config.data.toy.seed + seed})
    data = config.data.model_copy(update={"toy": toy})
    workdir, machine = str(Path(config.workdir) / f"seed-{seed}"), config.runtime
    if machine.bucket is not None:
        machine = machine.model_copy(update={"bucket": f"{machine.bucket.rstrip('/')}/seed-{seed}"})
    return config.model_copy(update={"seed": seed, "workdir": workdir, "data": data, "runtime": machine})


def plan_table(config: Config) -> list[Planned]:
    """Every stage of the table in the order in which it is made: seed by seed, run by run."""
    stages: list[Planned] = []
    for seed in config.table.seeds:
        own = seed_config(config, seed)
        pipeline = Pipeline(own, Listing(Path(own.workdir), Bucket.of(own)))
        found: dict[str, Planned] = {}
        for variant in table_variants(config.table, config.select):
            for role, artifact in pipeline.experiment(variant.name).artifacts.items():
                recipe, first = artifact.manifest, (variant.name, role)
                one = found.setdefault(
                    artifact.id, Planned(seed, artifact.id, recipe, first, [], recipe.get("seconds"))
                )
                one.runs.append(variant.name)
        stages += found.values()
    return stages


def estimates(config: Config, stages: list[Planned]) -> list[Expected]:
    """What each stage that is not there will take: as long as its twin of another seed, else by its arithmetic."""
    measured = {stage.role: stage.seconds for stage in stages if stage.seconds is not None}
    missing = [stage for stage in stages if not stage.is_there]
    cost = None if all(stage.role in measured for stage in missing) else Cost(config)
    expected = []
    for stage in missing:
        seconds, known = measured.get(stage.role), stage.role in measured
        if cost is not None and not known:
            seconds = cost.seconds(stage)
        expected.append(Expected(stage.name, stage.kind, seconds, known))
    return expected


@dataclasses.dataclass
class Cost:
    """Rough seconds of stages that were never timed, from counted FLOPs and a matrix product timed on this machine."""

    config: Config

    @cached_property
    def _corpus(self) -> Corpus:
        return load_corpus(self.config)

    @cached_property
    def _sizes(self) -> Any:
        path = self.config.model.path
        if path is not None:
            return loading.open_model(path).decoder
        codec = TextCodec(base_tokenizer(self.config), self.config.text)
        return loading.scratch_sizes(self.config, codec.vocab_size)

    @cached_property
    def _flops_per_s(self) -> float:
        return SHARE_OF_PEAK * self.config.mesh.num_devices * time_matmul(machine.compute_dtype(self.config.model)).rate

    def seconds(self, stage: Planned) -> float:
        """The estimate; a factor of three off is no surprise."""
        work = getattr(self, f"_{stage.kind}")(stage.recipe)
        return FIXED_SECONDS + work.flops / self._flops_per_s

    def _rows(self, count: int, responses: int) -> Rows:
        text = self.config.text
        return Rows(count, text.max_prompt_tokens, responses, text.max_response_tokens)

    def _updates(self, train: TrainConfig, examples: int) -> int:
        return num_steps(examples, epochs=train.epochs, steps=train.steps, batch_size=train.batch_size)

    def _train(self, train: TrainConfig, examples: int, responses: int, head: flops.Head) -> Work:
        rows = self._rows(train.batch_size, responses)
        step = flops.train(self._sizes, rows, head, self.config.model.remat)
        return step.times(self._updates(train, examples))

    def _sft(self, recipe: Mapping[str, Any]) -> Work:
        return self._train(self.config.sft.train, len(self._corpus.demonstrations), 1, "lm")

    def _reward(self, recipe: Mapping[str, Any]) -> Work:
        measured = flops.forward(self._sizes, self._rows(len(self._corpus.reward_test), 2), "value")
        if self.config.reward.path is not None:
            return measured
        return measured + self._train(self.config.reward.train, len(self._corpus.reward_pairs), 2, "value")

    @property
    def _num_prompts(self) -> int:
        return len(self._corpus.sampled_prompts(self.config.select.num_prompts))

    @property
    def _num_pairs(self) -> int:
        return len(self._corpus.human_pairs(self.config.select.num_prompts))

    def _selected(self) -> int:
        return self._num_pairs if self.config.select.pair_source == "human" else self._num_prompts

    def _select(self, recipe: Mapping[str, Any]) -> Work:
        rows = self._rows(self._selected(), 2)
        drawn = self._drawn(rows) if self.config.select.pair_source == "sampled" else Work(0.0)
        return drawn + flops.forward(self._sizes, rows, "value")

    def _drawn(self, rows: Rows) -> Work:
        decoded = flops.decode(self._sizes, rows, shards=1, bytes_each=4)
        return flops.prefill(self._sizes, rows) + Work(DECODING_COST * decoded.flops)

    def _examples(self, recipe: Mapping[str, Any], whole: int) -> int:
        """Of `whole` rows, those in the step's subset."""
        settings = recipe["settings"]
        fraction = settings.get("easy_fraction")
        easy = UNKNOWN_EASY_SHARE if fraction is None else fraction
        return round({"all": 1.0, "easy": easy, "hard": 1.0 - easy}[settings["subset"]] * whole)

    def _dpo(self, recipe: Mapping[str, Any]) -> Work:
        whole = self._selected() if "pairs" in recipe["parents"] else self._num_pairs
        examples = self._examples(recipe, whole)
        reference = flops.forward(self._sizes, self._rows(examples, 2), "lm")
        return reference + self._train(self.config.dpo.train, examples, 2, "lm")

    def _ppo(self, recipe: Mapping[str, Any]) -> Work:
        ppo = self.config.ppo
        whole = self._selected() if "pairs" in recipe["parents"] else self._num_prompts
        rows = self._rows(ppo.train.batch_size, 1)
        scored = flops.forward(self._sizes, rows, "lm") + flops.forward(self._sizes, rows, "value")
        updated = [flops.train(self._sizes, rows, head, self.config.model.remat) for head in ("lm", "value")]
        step = self._drawn(rows) + scored + (updated[0] + updated[1]).times(ppo.epochs)
        return step.times(self._updates(ppo.train, self._examples(recipe, whole)))

    def _evaluate(self, recipe: Mapping[str, Any]) -> Work:
        rows = self._rows(len(self._corpus.test_prompts[: self.config.evaluate.num_prompts]), 1)
        scored = flops.forward(self._sizes, rows, "lm").times(2) + flops.forward(self._sizes, rows, "value")
        return self._drawn(rows) + scored
