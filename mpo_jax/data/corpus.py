"""From the data section to rows: which reader, which split, and a fingerprint of it all."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from mpo_jax.chat import Chat
from mpo_jax.config import Config, DataConfig, ModelConfig, TextConfig
from mpo_jax.data import hh, records, tldr, toy
from mpo_jax.data.records import DataReport, Demonstration, Preference, Renderer, is_validation
from mpo_jax.data.sources import HUB, Source, fingerprint_files, open_source
from mpo_jax.errors import UserError
from mpo_jax.hub import local_model
from mpo_jax.text import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All rows of a run.

    Attributes:
      demonstrations: SFT's training rows.
      pairs: preference rows for the reward model, selection and DPO.
      held_out: preference rows that nothing trains on: reward accuracy and evaluation prompts. Empty where
        data.validation_fraction is 0 and there is no data.test_path.
      prompts: for sampling, each once, in the order of their first row: of data.prompt_path, else of `pairs`.
      reports: what was read and dropped, a source each.
      utility: the toy world's true utility of (prompt, response); None for real data.
    """

    demonstrations: list[Demonstration]
    pairs: list[Preference]
    held_out: list[Preference]
    prompts: list[str]
    reports: list[DataReport]
    utility: Callable[[str, str], float] | None = None

    @property
    def test_prompts(self) -> list[str]:
        return _each_once(self.held_out)


def fingerprint(config: DataConfig) -> str:
    """A hash of everything that the rows depend on; files count by content, not by name.

    Raises:
      UserError: a source that is missing; a data set of the hub that cannot be loaded.
    """
    if config.kind == "toy":
        content: Any = config.toy.model_dump(mode="json")
    else:
        fields = ("path", "sft_path", "test_path", "prompt_path")
        content = {field: _fingerprint_sources(getattr(config, field)) for field in fields}
        options = {"filter", "keep_news", "validation_fraction", "max_rows"}
        content["options"] = config.model_dump(mode="json", include=options)
    return hashlib.sha256(json.dumps([config.kind, content], sort_keys=True).encode()).hexdigest()


def _fingerprint_sources(specs: tuple[str, ...]) -> list[Any]:
    # splits of one hub data set can share their files, so there the name counts too
    hub = [spec for spec in specs if spec.startswith(HUB)]
    return [hub, fingerprint_files(file for spec in specs for file in open_source(spec).files())]


def load_corpus(config: Config) -> Corpus:
    """Reads or generates all rows; the last ones stay in memory.

    They depend on the data section, on text.chat and, where conversations are rendered, on the tokenizer of model.path.

    Raises:
      UserError: a missing file, a broken row (file and line), a template that refuses a row, or a set that is empty
        after filtering.
    """
    return _load(
        Config(data=config.data, text=TextConfig(chat=config.text.chat), model=ModelConfig(path=config.model.path))
    )


@lru_cache(maxsize=2)
def _load(config: Config) -> Corpus:
    data = config.data
    corpus = _load_toy(config) if data.kind == "toy" else _load_sources(config)
    needed = {"demonstrations": True, "pairs": True, "held_out": data.holds_out, "prompts": bool(data.prompt_path)}
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
    """The true utility of (prompt, response), which the toy world has and real data have not."""
    return toy.utility if config.kind == "toy" else None


def _load_toy(config: Config) -> Corpus:
    if config.text.chat:
        raise UserError("text.chat=true needs rows from files: the toy world has no conversations (data.kind=toy)")
    data, world = config.data, config.data.toy
    pairs = toy.preferences(world, test=False)
    return Corpus(
        demonstrations=toy.demonstrations(world),
        pairs=pairs,
        held_out=toy.preferences(world, test=True),
        prompts=_each_once(pairs),
        reports=[
            DataReport("toy demonstrations", world.num_demonstrations, world.num_demonstrations),
            DataReport("toy preferences", world.num_pairs, world.num_pairs),
            DataReport("toy test preferences", world.num_test, world.num_test),
        ],
        utility=known_utility(data),
    )


@dataclasses.dataclass(frozen=True)
class _Readers:
    """A kind's readers, each from a source to rows and what became of them."""

    preferences: Callable[[Source], tuple[list[Preference], DataReport]]
    demonstrations: Callable[[Source], tuple[list[Demonstration], DataReport]]
    prompts: Callable[[Source], tuple[list[str], DataReport]]


def _readers(config: Config) -> _Readers:
    data = config.data
    turns = hh.dialogue_turns if data.kind == "hh" else records.user_turn
    render = Renderer(cache(lambda: Chat(base_tokenizer(config))), wrap=config.text.chat, turns=turns)
    options: Any = {"strict": data.filter == "strict", "max_rows": data.max_rows, "render": render}
    if data.kind == "tldr":
        return _Readers(
            partial(tldr.read_tldr_preferences, keep_news=data.keep_news, **options),
            partial(tldr.read_tldr_demonstrations, **options),
            partial(tldr.read_tldr_prompts, keep_news=data.keep_news, **options),
        )
    demonstrations = partial(records.read_demonstrations, **options)
    if data.kind == "hh":
        return _Readers(partial(hh.read_hh, **options), demonstrations, partial(hh.read_hh_prompts, **options))
    return _Readers(
        partial(records.read_preferences, **options), demonstrations, partial(records.read_prompts, **options)
    )


def _load_sources(config: Config) -> Corpus:
    data, readers = config.data, _readers(config)
    reports: list[DataReport] = []

    def held_out(row: Preference | Demonstration) -> bool:
        return is_validation(row.group, seed=0, fraction=data.validation_fraction)

    def pairs_of(source: Source) -> list[Preference]:
        rows, report = readers.preferences(source)
        reports.append(report)
        return rows

    def demonstrations_of(source: Source, name: str) -> list[Demonstration]:
        rows, report = readers.demonstrations(source)
        reports.append(dataclasses.replace(report, source=name))
        return [row for row in rows if not held_out(row)]

    training: list[Preference] = []
    validation: list[Preference] = []
    imitated: list[Demonstration] = []
    for source in map(open_source, data.path):
        rows = pairs_of(source)
        own = [row for row in rows if not held_out(row)]
        training += own
        validation += [row for row in rows if held_out(row)]
        if data.sft_path:
            continue
        if data.kind == "tldr" and tldr.has_references(source):
            imitated += demonstrations_of(source, f"{source.name} (references)")
        else:
            imitated += [Demonstration(row.prompt, row.chosen, row.group) for row in own]
    tests = [row for source in map(open_source, data.test_path) for row in pairs_of(source)]
    for source in map(open_source, data.sft_path):
        imitated += demonstrations_of(source, source.name)
    held = tests if data.test_path else validation
    prompts = _each_once(training)
    if data.prompt_path:
        prompts = _read_prompts(data.prompt_path, readers, set(_each_once(held)), reports)
    return Corpus(imitated, training, held, prompts, reports)


def _read_prompts(specs: tuple[str, ...], readers: _Readers, tests: set[str], reports: list[DataReport]) -> list[str]:
    """The prompts of data.prompt_path, without repetitions and without those that are tested on."""
    prompts: dict[str, None] = {}
    for source in map(open_source, specs):
        rows, report = readers.prompts(source)
        for prompt in rows:
            if prompt in tests:
                report.drop("also a test prompt")
            elif prompt in prompts:
                report.drop("repeated prompt")
            else:
                prompts[prompt] = None
        report.kept = report.read - report.dropped.total()
        reports.append(report)
    return list(prompts)


def _each_once(rows: Iterable[Preference]) -> list[str]:
    return list(dict.fromkeys(row.prompt for row in rows))


def fingerprint_model(path: str) -> str:
    """A hash of a model's files, so that changed weights are another model, and the same elsewhere are the same."""
    local = local_model(path)
    return fingerprint_files([local] if local.is_file() else sorted(file for file in local.iterdir() if file.is_file()))


def base_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; a model from scratch uses the toy world's.

    Raises:
      UserError: if rows from files are to be read by a model that has no tokenizer.
    """
    if config.model.path is not None:
        return load_tokenizer(local_model(config.model.path))
    if config.data.kind != "toy":
        raise UserError(
            f"data.kind={config.data.kind} needs model.path: a model whose tokenizer reads the files "
            "(a model from scratch knows only the toy world's words)"
        )
    return toy.make_tokenizer()
