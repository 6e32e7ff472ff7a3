"""Loads the rows named by the `data` section: picks readers, splits the rows and fingerprints the sources."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from mpo_jax.config.base import recipe_values
from mpo_jax.config.registry import ROW_FORMATS
from mpo_jax.config.schema import Config, DataConfig, ModelConfig, TextConfig
from mpo_jax.data import toy
from mpo_jax.data.chat import Chat, Message, read_template
from mpo_jax.data.records import (
    DataReport,
    Demonstration,
    Preference,
    Prompt,
    Readers,
    Renderer,
    RowFormat,
    is_validation,
)
from mpo_jax.data.sources import HUB, Source, fingerprint_files, open_source
from mpo_jax.data.text_rows import TextRow
from mpo_jax.errors import UserError
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer

T = TypeVar("T")
TESTED = "also a test prompt"
CHAT_KEYS = ("chat", "chat_template", "template_options", "fold_system")
"""The keys of `text` that rows depend on."""
FIRST_ROWS = 4
"""Rows of each file that are read before a run starts, to see that they are of the right kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """All rows of a run. No training row has a test prompt.

    Attributes:
      demonstrations: training rows for SFT.
      pairs: preference rows for selection and DPO.
      reward_pairs: the reward model's training rows: `pairs` without the validation rows.
      validation: preference rows held out from the reward model only; with a test set, other stages train on them.
      held_out: preference rows held out from every stage: data.test_path, or `validation` without a test set.
      prompts: prompts to sample from: data.prompt_path, else those of `pairs`; one per row or distinct, as
        data.prompts says.
      test_prompts: distinct prompts for evaluating policies: data.test_prompt_path, else those of `held_out`.
      categories: category of each test prompt that has one.
      reports: rows read and dropped, one report per source.
      pairs_by_prompt: whether `prompts` are the distinct prompts of `pairs`.
      conversations: the turns of each prompt that a chat template has rendered, by its text.
      utility: true utility of (prompt, response) in the toy world; None for real data.
    """

    demonstrations: list[Demonstration]
    pairs: list[Preference]
    reward_pairs: list[Preference]
    validation: list[Preference]
    held_out: list[Preference]
    prompts: list[str]
    test_prompts: list[str]
    categories: Mapping[str, str]
    reports: list[DataReport]
    pairs_by_prompt: bool
    conversations: Mapping[str, tuple[Message, ...]] = dataclasses.field(default_factory=dict)
    utility: Callable[[str, str], float] | None = None

    @property
    def sizes(self) -> str:
        """A one-line summary of the sets' sizes."""
        return (
            f"{len(self.demonstrations)} demonstrations, {len(self.pairs)} pairs ({len(self.reward_pairs)} of them for "
            f"the reward model), {len(self.prompts)} prompts to sample from ({len(set(self.prompts))} distinct), "
            f"{len(self.held_out)} held-out pairs, {len(self.test_prompts)} test prompts"
        )

    @property
    def reward_test(self) -> list[Preference]:
        """Preference rows on which reward accuracy is reported; the reward model does not train on them."""
        return self.held_out or self.validation

    def category(self, prompt: str) -> str | None:
        """The category of a test prompt; None if its rows name none or several."""
        return self.categories.get(prompt)

    def sampled_prompts(self, num_prompts: int | None) -> list[str]:
        """The first `num_prompts` prompts (None: all), for selection and for PPO without a selection."""
        return self.prompts[:num_prompts]

    def human_pairs(self, num_prompts: int | None) -> list[Preference]:
        """The labelled pairs of `sampled_prompts`, or the first `num_prompts` pairs if prompts have their own rows."""
        if not self.pairs_by_prompt:
            return self.pairs[:num_prompts]
        part = set(self.sampled_prompts(num_prompts))
        return [row for row in self.pairs if row.prompt in part]


def fingerprint(config: DataConfig, cache: Path | None = None, *, chat_template: str | None = None) -> str:
    """A hash of everything the rows depend on: of a file its content, and its name only if that implies a category.

    Args:
      cache: folder of files' digests from earlier runs.
      chat_template: file of the template, if it is not the tokenizer's own.

    Raises:
      UserError: if a source is missing or a hub data set cannot be loaded.
    """
    options = {"validation_fraction", "prompts"}
    if config.kind == "toy":
        content: Any = {"world": config.toy.model_dump(mode="json")}
    else:
        fields = ("path", "sft_path", "test_path", "prompt_path", "test_prompt_path")
        content = {}
        for field in fields:
            with _naming(field):
                content[field] = _fingerprint_sources(getattr(config, field), cache)
        if (category := _format(config.kind).category) is not None:
            content["categories"] = [_named_categories(getattr(config, field), category) for field in fields]
        options |= {"filter", "keep_news", "max_rows", "order"}
    if chat_template is not None:
        content["chat_template"] = read_template(chat_template)
    content["options"] = {key: value for key, value in recipe_values(config).items() if key in options}
    return hashlib.sha256(json.dumps([config.kind, content], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Puts the key of the `data` section whose rows are wrong in front of an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.{key}: {error}") from error


def _fingerprint_sources(specs: tuple[str, ...], cache: Path | None) -> list[Any]:
    # splits of one hub data set can share files, so the name is hashed too
    hub = [spec for spec in specs if spec.startswith(HUB)]
    return [hub, fingerprint_files((file for spec in specs for file in open_source(spec).files()), cache)]


def _named_categories(specs: tuple[str, ...], category: Callable[[str], str | None]) -> list[str | None]:
    local = (spec for spec in specs if not spec.startswith(HUB))
    return [category(str(file)) for spec in local for file in open_source(spec).files()]


def load_corpus(config: Config) -> Corpus:
    """Reads or generates all rows; the two most recent results are cached in memory.

    Rows depend on the `data` section, on text.chat and, if conversations are rendered, on the tokenizer of model.path
    and the chat template's keys in `text`.

    Raises:
      UserError: for a missing file, a broken row (with file and line), a row that the chat template rejects, or a set
        that is empty after filtering.
    """
    text = TextConfig(**{key: getattr(config.text, key) for key in CHAT_KEYS})
    return _load(Config(data=config.data, text=text, model=ModelConfig(path=config.model.path)))


@lru_cache(maxsize=2)
def _load(config: Config) -> Corpus:
    data = config.data
    corpus = _load_toy(config) if data.kind == "toy" else _load_sources(config)
    needed = {
        "demonstrations": True,
        "pairs": True,
        "reward_pairs": bool(corpus.pairs),
        "held_out": data.holds_out,
        "prompts": bool(data.prompt_path),
        "test_prompts": bool(data.test_prompt_path),
    }
    empty = [name for name, wanted in needed.items() if wanted and not getattr(corpus, name)]
    if empty:
        sources = "; ".join(
            f"{r.source}: read {r.read}, kept {r.kept}, dropped {dict(r.dropped)}" for r in corpus.reports
        )
        raise UserError(
            f"the data set has no {', '.join(empty)} rows. {sources}. Check the files"
            + (" or raise data.validation_fraction or name data.test_path" if "held_out" in empty else "")
        )
    return corpus


def known_utility(config: DataConfig) -> Callable[[str, str], float] | None:
    """The true utility of (prompt, response) for the toy world; None for real data."""
    return toy.utility if config.kind == "toy" else None


Part = tuple[list[T], DataReport]
"""A source's kept rows and the report that counts the dropped ones."""


def _load_toy(config: Config) -> Corpus:
    if config.text.chat:
        raise UserError("text.chat=true needs rows from files: the toy world has no conversations (data.kind=toy)")

    def part(name: str, rows: list[T]) -> Part[T]:
        return rows, DataReport(name, len(rows), len(rows))

    data, world = config.data, config.data.toy
    return _assemble(
        data,
        demonstrations=[part("toy demonstrations", toy.demonstrations(world))],
        pairs=[part("toy preferences", toy.preferences(world, test=False))],
        tests=[part("toy test preferences", toy.preferences(world, test=True))],
    )


def _assemble(
    data: DataConfig,
    *,
    demonstrations: list[Part[Demonstration]],
    pairs: list[Part[Preference]],
    tests: Sequence[Part[Preference]] = (),
    prompts: Sequence[Part[Prompt]] = (),
    test_prompts: Sequence[Part[Prompt]] = (),
    conversations: Mapping[str, tuple[Message, ...]] | None = None,
) -> Corpus:
    """Splits the rows into sets; rows that a set must not contain are dropped and counted."""

    def is_held(row: Preference | Demonstration) -> bool:
        return is_validation(row.group, seed=0, fraction=data.validation_fraction)

    join = _interleaved if data.order == "interleaved" else _one_after_the_other
    held_out, asked = (join([rows for rows, _ in parts]) for parts in (tests, test_prompts))
    tested = {row.group for row in (*held_out, *asked)}
    own = join(_keep(pairs, lambda row: TESTED if row.group in tested else None))
    validation = [row for row in own if is_held(row)]
    reward_pairs = [row for row in own if not is_held(row)]
    if not data.has_test_set:
        own, held_out = reward_pairs, validation
        tested = {row.group for row in validation}

    def unfit(row: Demonstration) -> str | None:
        if row.group in tested:
            return TESTED
        return "validation prompt" if not data.has_test_set and is_held(row) else None

    imitated = join(_keep(demonstrations, unfit))
    sampled = [row.prompt for row in own]
    if data.prompts == "unique":
        sampled = list(dict.fromkeys(sampled))
    if data.prompt_path:
        sampled = [row.prompt for row in join(_keep(prompts, _prompt_filter(tested, data.prompts == "unique")))]
    evaluated = asked if data.test_prompt_path else held_out
    return Corpus(
        demonstrations=imitated,
        pairs=own,
        reward_pairs=reward_pairs,
        validation=validation,
        held_out=held_out,
        prompts=sampled,
        test_prompts=list(dict.fromkeys(row.prompt for row in evaluated)),
        categories=_categories(evaluated),
        reports=[report for _, report in (*pairs, *tests, *demonstrations, *prompts, *test_prompts) if report.source],
        pairs_by_prompt=data.prompts == "unique" and not data.prompt_path,
        conversations=conversations or {},
        utility=known_utility(data),
    )


def _one_after_the_other(parts: Sequence[list[T]]) -> list[T]:
    return [row for rows in parts for row in rows]


def _interleaved(parts: Sequence[list[T]]) -> list[T]:
    """The rows of all parts in turns, in proportion to their number; within a part their order stays."""
    placed = [((i + 0.5) / len(rows), row) for rows in parts for i, row in enumerate(rows)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _keep(parts: Iterable[Part[T]], reason: Callable[[T], str | None]) -> list[list[T]]:
    """Each part's rows for which `reason` returns None; the others are counted by reason in their source's report."""
    kept = []
    for rows, report in parts:
        why_not = [(row, reason(row)) for row in rows]
        kept.append([row for row, why in why_not if why is None])
        for _, why in why_not:
            if why is not None:
                report.drop(why)
        report.kept = report.read - report.dropped.total()
    return kept


def _prompt_filter(tested: set[str], each_once: bool) -> Callable[[Prompt], str | None]:
    """Returns the reason to drop a prompt: it is a test prompt or, if `each_once`, a duplicate."""
    seen: set[str] = set()

    def reason(row: Prompt) -> str | None:
        if row.group in tested:
            return TESTED
        if each_once and row.prompt in seen:
            return "repeated prompt"
        seen.add(row.prompt)
        return None

    return reason


def _categories(rows: Sequence[Prompt | Preference]) -> dict[str, str]:
    """The category of each prompt whose rows agree on one."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.category is not None:
            found.setdefault(row.prompt, set()).add(row.category)
    return {prompt: names.pop() for prompt, names in found.items() if len(names) == 1}


def _format(kind: str) -> RowFormat:
    return importlib.import_module(ROW_FORMATS[kind]).FORMAT


def _readers(config: Config, conversations: dict[str, tuple[Message, ...]] | None = None) -> Readers:
    data, form = config.data, _format(config.data.kind)
    render = Renderer(
        cache(lambda: Chat.of(base_tokenizer(config), config.text)),
        wrap=config.text.chat,
        turns=form.turns,
        conversations=conversations,
    )
    return form.readers(data, {"strict": data.filter == "strict", "max_rows": data.max_rows, "render": render})


def check_first_rows(config: Config) -> TextRow | None:
    """Reads the first rows of every source under the reader of its key, as `load_corpus` will read all of them.

    Returns:
      The first pair's chosen response, for what scores responses; None if the first rows have no pair that is kept.

    Raises:
      UserError: for a missing source or a row of another layout; names the key.
    """
    data = config.data
    if data.kind == "toy":
        pair = toy.preferences(data.toy.model_copy(update={"num_pairs": 1}), test=False)[0]
        return TextRow(pair.prompt, pair.chosen, complete=True)
    first = min(FIRST_ROWS, data.max_rows or FIRST_ROWS)
    conversations: dict[str, tuple[Message, ...]] = {}
    pairs: list[Preference] = []
    readers = _readers(config.model_copy(update={"data": data.model_copy(update={"max_rows": first})}), conversations)
    readers_by_key: dict[str, Callable[[Source], Any]] = {
        "path": readers.preferences,
        "sft_path": readers.demonstrations,
        "test_path": readers.preferences,
        "prompt_path": readers.prompts,
        "test_prompt_path": readers.prompts,
    }
    for key, reader in readers_by_key.items():
        for spec in getattr(data, key):
            with _naming(key):
                rows, _ = reader(open_source(spec))
            if key == "path":
                pairs += rows
    if not pairs:
        return None
    return TextRow.of(pairs[0].prompt, pairs[0].chosen, complete=True, conversations=conversations)


def _load_sources(config: Config) -> Corpus:
    conversations: dict[str, tuple[Message, ...]] = {}
    data, readers = config.data, _readers(config, conversations)

    def read(key: str, reader: Callable[[Source], Part[T]]) -> list[Part[T]]:
        with _naming(key):
            return [reader(open_source(spec)) for spec in getattr(data, key)]

    imitated = read("sft_path", readers.demonstrations)
    pairs = read("path", readers.preferences)
    for spec, (rows, _) in zip(() if data.sft_path else data.path, pairs, strict=False):
        source = open_source(spec)
        if _format(data.kind).has_references(source):
            with _naming("path"):
                references, own = readers.demonstrations(source)
            imitated.append((references, dataclasses.replace(own, source=f"{source.name} (references)")))
        else:
            # these rows are already counted with the pairs
            imitated.append(([Demonstration(r.prompt, r.chosen, r.group, r.category) for r in rows], DataReport("")))
    return _assemble(
        data,
        demonstrations=imitated,
        pairs=pairs,
        tests=read("test_path", readers.preferences),
        prompts=read("prompt_path", readers.prompts),
        test_prompts=read("test_prompt_path", readers.prompts),
        conversations=conversations,
    )


def base_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model, or the toy world's for one from scratch, with `text.chat_template` if it is set.

    Raises:
      UserError: if rows come from files but the model has no tokenizer, or the template's file cannot be read.
    """
    template = None if config.text.chat_template is None else read_template(config.text.chat_template)
    if config.model.path is not None:
        tokenizer = load_tokenizer(local_model(config.model.path))
    elif config.data.kind != "toy":
        raise UserError(
            f"data.kind={config.data.kind} needs model.path: a model whose tokenizer reads the files "
            "(a model from scratch knows only the toy world's words)"
        )
    else:
        tokenizer = toy.make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
