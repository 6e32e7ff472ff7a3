"""The sections `text`, `data` and `data.toy`: where rows come from, and how text becomes tokens."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mpo_jax.config.base import Section


class TextConfig(Section, frozen=True):
    """Token limits and joins. A prompt is cut before a response; see ALGORITHMS in mpo_jax/README.md."""

    max_prompt_tokens: int = Field(default=512, gt=0)
    max_response_tokens: int = Field(default=512, gt=0)
    add_bos: Literal["auto", "true", "false"] = "auto"
    prompt_template: str = Field(default="{prompt}", description="text around every prompt; must hold {prompt}")
    chat: bool = Field(default=False, description="prompts as turns in the tokenizer's chat template")
    truncation: Literal["auto", "start", "post"] = Field(
        default="auto",
        description="where too long a prompt is cut: its start, or the end of its POST section; auto: the POST section "
        "where there is one",
    )
    length_buckets: int = Field(
        default=4, gt=0, le=16, description="widths that batches are padded to, at most; 1: all to the longest row"
    )

    @field_validator("add_bos", mode="before")
    @classmethod
    def _yaml_bool(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("prompt_template")
    @classmethod
    def _has_slot(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("must hold {prompt} exactly once")
        return value


class ToyConfig(Section, frozen=True):
    """The toy TL;DR world; every number of its utility is documented in data/toy.py."""

    seed: int = Field(default=0, description="of the world's posts and labels, apart from the training seed")
    num_demonstrations: int = Field(default=4000, gt=0)
    num_pairs: int = Field(default=3000, gt=0)
    num_test: int = Field(default=400, gt=0)
    num_values: int = Field(default=12, ge=2, le=16, description="different values of each fact: the vocabulary's size")
    num_attempts: int = Field(
        default=2, ge=1, le=4, description="attempts a post, each a fact besides who, problem, question"
    )
    num_fillers: int = Field(default=1, ge=0, le=3, description="sentences without a fact")
    label_temperature: float = Field(default=1.0, gt=0, description="of the Bradley-Terry labels: higher is noisier")


class DataConfig(Section, frozen=True):
    """Where rows come from.

    A path is a .jsonl, .jsonl.gz or .parquet file, a folder that `datasets` saved, or
    hub:ORG/NAME[@REVISION][:DIR][:SPLIT].
    """

    kind: Literal["toy", "hh", "tldr", "pairs"] = "toy"
    path: tuple[str, ...] = Field(default=(), description="preference rows: training and, by split, validation")
    sft_path: tuple[str, ...] = Field(default=(), description="demonstrations; absent: the chosen responses")
    test_path: tuple[str, ...] = Field(
        default=(), description="preference rows that reward accuracy is measured on; absent: validation"
    )
    prompt_path: tuple[str, ...] = Field(
        default=(), description="prompt-only rows for selection and PPO; absent: the prompts of the training pairs"
    )
    test_prompt_path: tuple[str, ...] = Field(
        default=(),
        description="rows of any kind whose prompts policies are evaluated on; absent: the held-out pairs' prompts",
    )
    prompts: Literal["rows", "unique"] = Field(
        default="rows",
        description="selection and PPO sample once a row of the preference data (or of prompt_path), as the paper; "
        "unique: once a distinct prompt",
    )
    filter: Literal["strict", "none"] = "strict"
    keep_news: bool = Field(default=False, description="of tldr: keep the comparisons on news articles, without a post")
    validation_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="of the prompts, whose pairs the reward model does not train on; without a test set nothing does",
    )
    max_rows: int | None = Field(default=None, gt=0, description="the first rows of each file only")
    toy: ToyConfig = Field(default_factory=lambda: ToyConfig())

    @field_validator("path", "sft_path", "test_path", "prompt_path", "test_prompt_path", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def has_test_set(self) -> bool:
        """Whether there are rows apart to test on, so that validation rows are left out of the reward model alone."""
        return self.kind == "toy" or bool(self.test_path) or bool(self.test_prompt_path)

    @property
    def has_test_prompts(self) -> bool:
        """Whether there are prompts to evaluate policies on."""
        return self.has_test_set or self.validation_fraction > 0

    @property
    def holds_out(self) -> bool:
        """Whether there are preference rows that nothing trains on."""
        return self.kind == "toy" or bool(self.test_path) or (self.validation_fraction > 0 and not self.has_test_set)

    @model_validator(mode="after")
    def _needs_path(self) -> "DataConfig":
        given = [name for name in type(self).model_fields if name.endswith("path") and getattr(self, name)]
        if self.kind == "toy" and given:
            raise ValueError(f"data.{given[0]} names files: say how to read them, data.kind=hh, tldr or pairs")
        if self.kind != "toy" and not self.path:
            raise ValueError(f"data.kind={self.kind} needs data.path: name one or more files, folders or hub data sets")
        return self
