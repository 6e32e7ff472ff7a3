"""The whole configuration. Its sections are in the modules beside this one and can be imported from here."""

import os
from typing import Any, ClassVar, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from mpo_jax.config.base import Section
from mpo_jax.config.data import DataConfig, TextConfig, ToyConfig
from mpo_jax.config.given import Given
from mpo_jax.config.machine import MeshConfig, ProcessesConfig, RuntimeConfig, WandbConfig
from mpo_jax.config.method import (
    DpoConfig,
    EvaluateConfig,
    ExperimentName,
    KlConfig,
    PpoConfig,
    PpoExtrasConfig,
    RewardConfig,
    SelectConfig,
    SftConfig,
    TableConfig,
    named_once,
)
from mpo_jax.config.model import AdapterConfig, ArchitectureConfig, ModelConfig
from mpo_jax.config.registry import TRAINED
from mpo_jax.config.suggestion import suggest
from mpo_jax.config.training import EVAL, HIGHER_IS_BETTER, LOWER_IS_BETTER, MEASURES, OptimConfig, TrainConfig

__all__ = [
    "EVAL",
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "MEASURES",
    "TRAINED",
    "AdapterConfig",
    "ArchitectureConfig",
    "Config",
    "DataConfig",
    "DpoConfig",
    "EvaluateConfig",
    "ExperimentName",
    "KlConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PpoConfig",
    "PpoExtrasConfig",
    "ProcessesConfig",
    "RewardConfig",
    "RuntimeConfig",
    "Section",
    "SelectConfig",
    "SftConfig",
    "TableConfig",
    "TextConfig",
    "ToyConfig",
    "TrainConfig",
    "WandbConfig",
]


class Config(Section, frozen=True):
    """Everything a run depends on."""

    IS_WHOLE: ClassVar[bool] = True

    workdir: str = Field(default="runs/default", description="folder of the stages, runs and report")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="random seed of initial weights, order of rows, and sampling"
    )
    experiment: tuple[ExperimentName, ...] = Field(
        default=("mpo",),
        description="runs to make. sft: SFT alone; dpo_base: DPO on the labelled pairs; dpo: DPO on all sampled pairs; "
        "ppo: PPO on all prompts; mpo: DPO on the easy pairs, then PPO on the hard prompts; mpo_sft_kl: mpo with SFT "
        "as PPO's reference; mpo_reverse: PPO on the hard prompts, then DPO on the easy pairs; mpo_reverse_sft: "
        "mpo_reverse with SFT as DPO's reference; dpo_easy, dpo_hard, ppo_easy, ppo_hard: one algorithm on one part",
    )
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    text: TextConfig = Field(default_factory=lambda: TextConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    sft: SftConfig = Field(default_factory=lambda: SftConfig())
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig())
    select: SelectConfig = Field(default_factory=lambda: SelectConfig())
    dpo: DpoConfig = Field(default_factory=lambda: DpoConfig())
    ppo: PpoConfig = Field(default_factory=lambda: PpoConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    table: TableConfig = Field(default_factory=lambda: TableConfig())
    mesh: MeshConfig = Field(default_factory=lambda: MeshConfig())
    runtime: RuntimeConfig = Field(default_factory=lambda: RuntimeConfig())
    _given: Given = PrivateAttr(default=Given())

    @property
    def given(self) -> Given:
        """The keys that were set by files and the command line; empty for a configuration made in Python."""
        return self._given

    def set_by(self, given: Given) -> Self:
        """The same configuration, which knows who set its keys."""
        known = self.model_copy()
        # no field, so not frozen
        known._given = given  # pyright: ignore[reportAttributeAccessIssue]
        return known

    @field_validator("experiment", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @field_validator("experiment")
    @classmethod
    def _runs_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return named_once(value)

    @field_validator("workdir")
    @classmethod
    def _is_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a folder, such as runs/mine")
        # shells leave a ~ behind a = as it is
        return os.path.expanduser(value)

    @model_validator(mode="after")
    def _can_split(self) -> "Config":
        negative = [threshold for threshold in self.table.thresholds if threshold < 0]
        if negative and self.select.pair_source == "sampled":
            raise ValueError(
                f"table.thresholds has {negative[0]:g}, which makes every pair easy: the gaps of sampled pairs are "
                "never below 0"
            )
        return self

    @model_validator(mode="after")
    def _has_a_first_policy(self) -> "Config":
        if self.sft.skip and self.model.path is None:
            raise ValueError("sft.skip=true needs model.path: without SFT a model from scratch is random weights")
        return self

    @model_validator(mode="after")
    def _has_scores(self) -> "Config":
        if not self.select.scores_pairs and self.data.kind != "scored":
            raise ValueError(
                "select.pair_source=scored needs rows that bring their scores, {prompt, responses, scores}: "
                f"data.kind=scored, not {self.data.kind}"
            )
        return self

    @model_validator(mode="after")
    def _can_measure(self) -> "Config":
        data = self.data
        measurable = {
            "sft": data.holds_out,
            "reward": data.holds_out or data.validation_fraction > 0,
            "dpo": data.holds_out,
            "ppo": data.has_test_prompts,
        }
        for stage in TRAINED:
            train: TrainConfig = getattr(self, stage).train
            if train.eval_every is not None and not measurable[stage]:
                raise ValueError(
                    f"{stage}.train.eval_every={train.eval_every} needs held-out rows: name preference rows as "
                    "data.test_path, or raise data.validation_fraction above 0"
                )
            if train.best_metric is None or not train.best_metric.startswith(EVAL):
                continue
            if train.eval_every is None:
                raise ValueError(
                    f"{stage}.train.best_metric={train.best_metric} is measured on held-out rows: set "
                    f"{stage}.train.eval_every, the updates between two measures"
                )
            known = [EVAL + name for name in MEASURES[stage] if name != "loss/nll" or self.dpo.nll_coef]
            if train.best_metric not in known:
                raise ValueError(
                    f"{stage}.train.best_metric={train.best_metric} is no measure of {stage}"
                    f"{suggest(train.best_metric, known)}"
                )
        return self
