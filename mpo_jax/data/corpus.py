"""Loads the rows named by the `data` section: picks readers, splits the rows and fingerprints the sources."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from mpo_jax.config.base import recipe_values
from mpo_jax.config.data import SOURCES
from mpo_jax.config.registry import ROW_FORMATS
from mpo_jax.config.schema import Config, DataConfig, ModelConfig, TextConfig
from mpo_jax.data import toy
from mpo_jax.data.chat import Chat, Message, read_template
from mpo_jax.data.columns import advice, check_columns, renamed
from mpo_jax.data.fields import NO_ASSISTANT, UNWRITTEN, MissingField
from mpo_jax.data.records import (
    DataReport,
    Demonstration,
    Preference,
    Readers,
    RowFormat,
)
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import HUB, Source, fingerprint_files, open_source
from mpo_jax.data.special_tokens import SpelledTokens
from mpo_jax.data.splits import TESTED, Corpus, Part, assemble
from mpo_jax.data.text_rows import TextRow
from mpo_jax.data.turns import Turns
from mpo_jax.errors import UserError
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.runtime.words import counted

T = TypeVar("T")
CHAT_KEYS = ("chat", "chat_template", "template_options", "fold_system", "end_markers")
"""The keys of `text` that rows depend on."""
FIRST_ROWS = 4
"""Rows of each file that are read before a run starts, to see that they are of the right kind."""


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
        content = {}
        for field in SOURCES:
            with _naming(field):
                content[field] = _fingerprint_sources(getattr(config, field), cache)
        if (category := _format(config.kind).category) is not None:
            content["categories"] = [_named_categories(getattr(config, field), category) for field in SOURCES]
        options |= {"filter", "keep_news", "max_rows", "order", "columns"}
    if chat_template is not None:
        content["chat_template"] = read_template(chat_template)
    content["options"] = {key: value for key, value in recipe_values(config).items() if key in options}
    return hashlib.sha256(json.dumps([config.kind, content], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Puts the key of the `data` section whose rows are wrong in front of an error."""
    try:
        yield
    except MissingField as error:
        raise UserError(f"data.{key}: {advice(error)}") from error
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
        "pairs": data.kind == "toy" or bool(data.path),
        "reward_pairs": bool(corpus.pairs),
        "held_out": data.kind == "toy" or bool(data.test_path),
        "prompts": bool(data.prompt_path),
        "test_prompts": bool(data.test_prompt_path),
    }
    empty = [name for name, wanted in needed.items() if wanted and not getattr(corpus, name)]
    if empty:
        sources = "; ".join(f"{r.source}: {_said(r)}" for r in corpus.reports)
        named = ", ".join({"held_out": "held-out pairs"}.get(name, name.replace("_", " ")) for name in empty)
        raise UserError(f"the data set has no {named}. {sources}. {_advice(corpus.reports, data.kind)}")
    if data.path and data.holds_out and not corpus.held_out:
        prompts = len({row.group for row in corpus.pairs})
        warn(
            f"data.validation_fraction={data.validation_fraction:g} of {prompts} prompts holds out no row: losses and "
            "accuracies are measured on none, and evaluation, which needs test prompts, will fail. Raise it, such as "
            f"to {max(0.2, 2 * data.validation_fraction):g}, or name data.test_path"
        )
    return corpus


def _said(report: DataReport) -> str:
    dropped = "".join(f", {count} dropped: {reason}" for reason, count in report.dropped.items())
    return f"{counted(report.read, 'row')} read, {report.kept} kept{dropped}"


def _advice(reports: Sequence[DataReport], kind: str) -> str:
    """What to do about a set that is empty, by why its rows were dropped."""
    reasons = {reason for report in reports for reason, count in report.dropped.items() if count}
    if TESTED in reasons:
        return "data.path and the test set hold the same prompts: name other rows as one of them"
    if any(UNWRITTEN in reason for reason in reasons):
        return "The model's chat template does not write these turns: name one that does, text.chat_template=FILE"
    if NO_ASSISTANT in reasons:
        return (
            f"data.kind={kind} reads whole dialogues as HH-RLHF has them: rows with a prompt of their own are "
            "data.kind=pairs"
        )
    return "Check the files"


def turns_of(config: Config) -> Turns:
    """The turns of the conversations that `load_corpus` reads."""
    return Turns(load_corpus(config).conversations, _chat(config))


def known_utility(config: DataConfig) -> Callable[[str, str], float] | None:
    """The true utility of (prompt, response) for the toy world; None for real data."""
    return toy.utility if config.kind == "toy" else None


def _load_toy(config: Config) -> Corpus:
    if config.text.chat:
        raise UserError("text.chat=true needs rows from files: the toy world has no conversations (data.kind=toy)")

    def part(name: str, rows: list[T]) -> Part[T]:
        return rows, DataReport(name, len(rows), len(rows))

    data, world = config.data, config.data.toy
    return assemble(
        data,
        demonstrations=[part("toy demonstrations", toy.demonstrations(world))],
        pairs=[part("toy preferences", toy.preferences(world, test=False))],
        tests=[part("toy test preferences", toy.preferences(world, test=True))],
        utility=toy.utility,
    )


def _format(kind: str) -> RowFormat:
    return importlib.import_module(ROW_FORMATS[kind]).FORMAT


def _renderer(
    config: Config, conversations: dict[str, tuple[Message, ...]], spelled: SpelledTokens | None = None
) -> Renderer:
    return Renderer(
        _chat(config),
        wrap=config.text.chat,
        turns=_format(config.data.kind).turns,
        conversations=conversations,
        spelled=spelled,
        ignored=Counter(),
    )


def _readers(config: Config, render: Renderer) -> Readers:
    data = config.data
    return _format(data.kind).readers(
        data, {"strict": data.filter == "strict", "max_rows": data.max_rows, "render": render}
    )


def _chat(config: Config) -> Callable[[], Chat]:
    """The factory of the base model's chat template under the options of `text`."""
    return cache(lambda: Chat.of(base_tokenizer(config), config.text))


def check_first_rows(config: Config) -> TextRow | None:
    """Reads the first rows of every source under the reader of its key, as `load_corpus` will read all of them.

    Returns:
      The first pair's chosen response, for what scores responses; None if the first rows have no pair that is kept.

    Raises:
      UserError: for a missing source or a row of another layout; names the key.
    """
    data = config.data
    for spec in data.path:
        if spec in (*data.test_path, *data.test_prompt_path):
            key = "test_path" if spec in data.test_path else "test_prompt_path"
            raise UserError(
                f"data.path and data.{key} both name {spec}: rows with test prompts are left out of training, so none "
                f"would be left. Without data.{key} a part of data.path is held out (data.validation_fraction)"
            )
    if data.kind == "toy":
        pair = toy.preferences(data.toy.model_copy(update={"num_pairs": 1}), test=False)[0]
        return TextRow(pair.prompt, pair.chosen, complete=True)
    first = min(FIRST_ROWS, data.max_rows or FIRST_ROWS)
    conversations: dict[str, tuple[Message, ...]] = {}
    pairs: list[Preference] = []
    few = config.model_copy(update={"data": data.model_copy(update={"max_rows": first})})
    readers = _readers(few, _renderer(few, conversations))
    readers_by_key: dict[str, Callable[[Source], Any]] = {
        "path": readers.preferences,
        "sft_path": readers.demonstrations,
        "test_path": readers.preferences,
        "prompt_path": readers.prompts,
        "test_prompt_path": readers.prompts,
    }
    sources = _sources(data)
    for key, reader in readers_by_key.items():
        for source in sources[key]:
            with _naming(key):
                rows, _ = reader(source)
            if key == "path":
                pairs += rows
    if not pairs:
        return None
    return TextRow.of(pairs[0].prompt, pairs[0].chosen, complete=True, conversations=conversations)


def _sources(data: DataConfig) -> dict[str, list[Source]]:
    """What each key names, with fields taken from columns of other names.

    Raises:
      UserError: for what is not there, or a column that the first rows lack.
    """
    sources: dict[str, list[Source]] = {}
    for key in SOURCES:
        with _naming(key):
            sources[key] = [renamed(open_source(spec), data.columns) for spec in getattr(data, key)]
    first = min(FIRST_ROWS, data.max_rows or FIRST_ROWS)
    every = [source for part in sources.values() for source in part]
    check_columns(every, data.columns, _format(data.kind).fields, first)
    return sources


def _say_repeated(key: str, specs: Sequence[str]) -> None:
    """Warns of a file that is named twice, also through a link or a folder."""
    files = Counter(file.resolve() for spec in specs if not spec.startswith(HUB) for file in open_source(spec).files())
    for file in (file for file, count in files.items() if count > 1):
        warn(f"data.{key} names {file} {files[file]} times: each of its rows counts as often")


def _load_sources(config: Config) -> Corpus:
    conversations: dict[str, tuple[Message, ...]] = {}
    spelled = None
    if config.model.path is not None:
        spelled = SpelledTokens(cache(lambda: base_tokenizer(config)), config.text.end_markers)
    render = _renderer(config, conversations, spelled)
    data, readers = config.data, _readers(config, render)
    sources = _sources(data)

    def read(key: str, reader: Callable[[Source], Part[T]]) -> list[Part[T]]:
        with _naming(key):
            _say_repeated(key, getattr(data, key))
            return [reader(source) for source in sources[key]]

    imitated = read("sft_path", readers.demonstrations)
    pairs = read("path", readers.preferences)
    for source, (rows, _) in zip(() if data.sft_path else sources["path"], pairs, strict=False):
        if _format(data.kind).has_references(source):
            with _naming("path"):
                references, own = readers.demonstrations(source)
            imitated.append((references, dataclasses.replace(own, source=f"{source.name} (references)")))
        else:
            # these rows are already counted with the pairs
            imitated.append(([Demonstration(r.prompt, r.chosen, r.group, r.category) for r in rows], DataReport("")))
    corpus = assemble(
        data,
        demonstrations=imitated,
        pairs=pairs,
        tests=read("test_path", readers.preferences),
        prompts=read("prompt_path", readers.prompts),
        test_prompts=read("test_prompt_path", readers.prompts),
        conversations=conversations,
    )
    tested, kept = sum(report.dropped[TESTED] for _, report in pairs), len(corpus.pairs)
    if tested > kept > 0:
        warn(
            f"{tested} of {tested + kept} training rows have prompts of the test set and are left out: check that "
            "data.path and data.test_path name different rows"
        )
    for message in [*(spelled.warnings() if spelled is not None else ()), *render.warnings()]:
        warn(message)
    return corpus


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
