"""The sections `text`, `data` and `data.toy`: where rows come from, and how text becomes tokens."""

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from mpo_jax.config.base import InRecipe, Names, NamesByName, Options, OptionsByName, Section
from mpo_jax.config.registry import ROW_FORMATS

SOURCES = ("path", "sft_path", "test_path", "prompt_path", "test_prompt_path")
"""The keys of `data` that name rows."""

TEMPLATE_ARGUMENTS = (
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
)  # fmt: skip
"""What chat templates are given anyway, or transformers' own arguments: no options of a template."""


class TextConfig(Section, frozen=True):
    """How text becomes tokens."""

    max_prompt_tokens: int = Field(
        default=512, gt=0, description="longest prompt in tokens, BOS included; longer ones are cut as truncation says"
    )
    max_response_tokens: int = Field(
        default=512,
        gt=0,
        description="longest response in tokens, EOS included, in the data and in sampling; longer ones lose their end",
    )
    add_bos: Literal["auto", "true", "false"] = Field(
        default="auto", description="start prompts with BOS; auto: if the tokenizer does"
    )
    prompt_template: str = Field(
        default="{prompt}", description="text around every prompt; must hold {prompt} exactly once"
    )
    chat: bool = Field(
        default=False,
        description="put plain prompts and HH-RLHF dialogues into the tokenizer's chat template, as conversations "
        "always are",
    )
    chat_template: Annotated[str | None, InRecipe.NEVER] = Field(
        default=None,
        description="file with a Jinja chat template to use in place of the tokenizer's; trained models carry it",
    )
    template_options: Annotated[OptionsByName, InRecipe.UNLESS_DEFAULT] = Field(
        default=(), description="the chat template's own options by name, such as {enable_thinking: false}"
    )
    fold_system: Annotated[bool, InRecipe.UNLESS_DEFAULT] = Field(
        default=False,
        description="where the chat template refuses a system turn, put its text in front of the first user turn; "
        "false: drop such rows, and count them",
    )
    truncation: Literal["auto", "start", "post"] = Field(
        default="auto",
        description="how a prompt that is too long is cut. start: at its start; post: at the end of its POST section "
        "(TL;DR); auto: post if it has one, else start",
    )
    end_markers: Annotated[Literal["strip", "keep"], InRecipe.UNLESS_DEFAULT] = Field(
        default="strip",
        description="strip: take special tokens such as </s> from the end of responses that spell them as text, "
        "and say of how many; keep: leave them, and the policy learns to spell them",
    )
    packed: bool = Field(
        default=True,
        description="train on packed rows: several prompts share a row, and one compiled program serves all batches; "
        "in PPO they hold the samples of an iteration. false: pad batches to length_buckets widths. Both give the same "
        "losses to rounding",
    )
    length_buckets: int = Field(
        default=4,
        gt=0,
        le=16,
        description="largest number of padded widths that batches are sorted into, each compiled once; 1: pad every "
        "batch to the longest row",
    )

    @field_validator("add_bos", mode="before")
    @classmethod
    def _yaml_bool(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("template_options")
    @classmethod
    def _own_options(cls, value: Options) -> Options:
        for name, _ in value:
            if name in TEMPLATE_ARGUMENTS or name.endswith("_token") or not name.isidentifier():
                raise ValueError(f"{name} is no option of a chat template: it is set by mpo, or is no variable's name")
        return value

    @field_validator("prompt_template")
    @classmethod
    def _has_slot(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("must hold {prompt} exactly once")
        return value


class ToyConfig(Section, frozen=True):
    """The toy TL;DR world, used with `data.kind=toy`. `mpo_jax/data/toy.py` defines its posts and their utility."""

    seed: int = Field(default=0, description="random seed of posts, summaries and labels; independent of the key seed")
    num_demonstrations: int = Field(default=4000, gt=0, description="demonstrations for SFT")
    num_pairs: int = Field(default=3000, gt=0, description="preference pairs for training")
    num_test: int = Field(default=400, gt=0, description="preference pairs of the test set")
    num_values: int = Field(
        default=12, ge=2, le=16, description="different values that each kind of fact can take; more is harder"
    )
    num_attempts: int = Field(
        default=2, ge=1, le=4, description="facts of the kind attempt in a post, besides one who, problem and question"
    )
    num_fillers: int = Field(default=1, ge=0, le=3, description="sentences in a post that state no fact")
    label_temperature: float = Field(
        default=1.0, gt=0, description="temperature of the Bradley-Terry labels; higher is noisier"
    )


Kind: TypeAlias = Literal[("toy", *ROW_FORMATS)]  # type: ignore[valid-type]


def _any_of(names: tuple[str, ...]) -> str:
    """`a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


class DataConfig(Section, frozen=True):
    """Where rows come from. The paths name sources, one or a list: files, folders, or data sets of the hub."""

    kind: Kind = Field(
        default="toy",
        description="layout of the rows; left out where a path is given: pairs. toy: the built-in toy world, without "
        "files; hh: HH-RLHF; tldr: Reddit TL;DR; pairs: {prompt, chosen, rejected}; "
        "scored: {prompt, responses, scores}, of which the best and the worst response are the pair",
    )
    path: tuple[str, ...] = Field(
        default=(), description="preference pairs for training, and for validation (validation_fraction)"
    )
    sft_path: tuple[str, ...] = Field(
        default=(),
        description="demonstrations for SFT; empty: the chosen responses of path, or its reference summaries (tldr)",
    )
    test_path: tuple[str, ...] = Field(
        default=(), description="preference pairs of the test set; empty: the validation pairs"
    )
    prompt_path: tuple[str, ...] = Field(
        default=(), description="prompts for selection and PPO; empty: the prompts of the training pairs"
    )
    test_prompt_path: tuple[str, ...] = Field(
        default=(),
        description="rows of any layout whose prompts policies are evaluated on; empty: the prompts of the test pairs",
    )
    columns: Annotated[NamesByName, InRecipe.UNLESS_DEFAULT] = Field(
        default=(),
        description="columns by the field that they hold, such as {prompt: question, chosen: answer_a}; the same for "
        "all paths",
    )
    prompts: Literal["rows", "unique"] = Field(
        default="rows",
        description="what selection and PPO sample from. rows: the prompt of every row, as in the paper; unique: every "
        "distinct prompt once",
    )
    order: Annotated[Literal["files", "interleaved"], InRecipe.UNLESS_DEFAULT] = Field(
        default="files",
        description="order of the rows of several files. files: one file after the other; interleaved: in turns, in "
        "proportion to their rows, so that the first rows of all (select.num_prompts, evaluate.num_prompts) are a mix",
    )
    filter: Literal["strict", "none"] = Field(
        default="strict",
        description="strict: drop rows with empty or equal responses, with two different prompts, or with turns that "
        "do not alternate (hh); none: drop only what cannot be used",
    )
    keep_news: bool = Field(
        default=False, description="keep OpenAI's comparisons of news summaries, whose prompt is no Reddit post (tldr)"
    )
    validation_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of the prompts, chosen by a hash of their text, that the reward model does not train on; "
        "without a test set they are the test set, and nothing trains on them",
    )
    max_rows: int | None = Field(default=None, gt=0, description="read only the first rows of each file; null: all")
    toy: ToyConfig = Field(default_factory=lambda: ToyConfig())

    @field_validator(*SOURCES, mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _are_text(cls, value: Any) -> Any:
        """YAML reads a column called yes as true, and one called 2 as a number."""
        for field, column in value.items() if isinstance(value, dict) else ():
            if not isinstance(column, str):
                raise ValueError(
                    f"the column for {field} was read as {json.dumps(column, default=str)}, which is no name. Put the "
                    f'name into quotes: {field}: "NAME" in a file, \'data.columns.{field}="NAME"\' on the command '
                    "line"
                )
        return value

    @field_validator("columns")
    @classmethod
    def _named(cls, value: Names) -> Names:
        for field, column in value:
            if not field or not column:
                raise ValueError("a field or its column has no name: write {prompt: question}")
        return value

    @property
    def has_test_set(self) -> bool:
        """Whether there is a separate test set, so that validation rows are held out from the reward model alone."""
        return self.kind == "toy" or bool(self.test_path) or bool(self.test_prompt_path)

    @property
    def sources(self) -> list[str]:
        """Every file, folder and hub data set that rows are read from, by any key."""
        return [path for key in SOURCES for path in getattr(self, key)]

    @property
    def has_test_prompts(self) -> bool:
        """Whether there are prompts to evaluate policies on."""
        return self.has_test_set or self.validation_fraction > 0

    @property
    def holds_out(self) -> bool:
        """Whether there are preference rows that nothing trains on."""
        return self.kind == "toy" or bool(self.test_path) or (self.validation_fraction > 0 and not self.has_test_set)

    @model_validator(mode="before")
    @classmethod
    def _files_hold_pairs(cls, values: Any) -> Any:
        """Rows named without a layout are of the common one, and never left aside for the toy world."""
        if isinstance(values, dict) and any(name.endswith("path") and value for name, value in values.items()):
            return {"kind": "pairs", **values}
        return values

    @model_validator(mode="after")
    def _needs_path(self) -> "DataConfig":
        given = [name for name in type(self).model_fields if name.endswith("path") and getattr(self, name)]
        if self.kind == "toy" and given:
            kinds = _any_of(tuple(ROW_FORMATS))
            raise ValueError(f"data.{given[0]} names files: say how to read them, data.kind={kinds}")
        if self.kind == "toy" and self.columns:
            raise ValueError(
                "data.columns names columns of files, and data.kind=toy reads none: name the files, data.path"
            )
        if self.kind != "toy" and not self.path and not self.sft_path:
            raise ValueError(f"data.kind={self.kind} needs data.path: name one or more files, folders or hub data sets")
        return self
