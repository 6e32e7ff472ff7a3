"""From the data section to rows: which reader, which split, and a fingerprint of it all."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mpo_jax.config import Config, DataConfig
from mpo_jax.data import toy
from mpo_jax.data.records import (
    DataReport,
    Demonstration,
    Preference,
    fingerprint_files,
    is_validation,
    read_demonstrations,
    read_pairs_of,
)
from mpo_jax.errors import UserError
from mpo_jax.text import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All rows of a run.

    Attributes:
      demonstrations: SFT's training rows.
      pairs: preference rows for the reward model, selection, DPO and PPO prompts.
      held_out: preference rows that nothing trains on: reward accuracy and evaluation prompts.
      reports: what was read and dropped, a source each.
      utility: the toy world's true utility of (prompt, response); None for real data.
    """

    demonstrations: list[Demonstration]
    pairs: list[Preference]
    held_out: list[Preference]
    reports: list[DataReport]
    utility: Callable[[str, str], float] | None = None

    @property
    def prompts(self) -> list[str]:
        """The training prompts, each once, in the order of their first row."""
        return list(dict.fromkeys(row.prompt for row in self.pairs))

    @property
    def test_prompts(self) -> list[str]:
        return list(dict.fromkeys(row.prompt for row in self.held_out))


def fingerprint(config: DataConfig) -> str:
    """A hash of everything that the rows depend on; files count by content, not by name."""
    if config.kind == "toy":
        content: Any = config.toy.model_dump(mode="json")
    else:
        content = {
            field: fingerprint_files(map(Path, getattr(config, field))) for field in ("path", "sft_path", "test_path")
        }
        content["options"] = config.model_dump(mode="json", include={"filter", "validation_fraction", "max_rows"})
    return hashlib.sha256(json.dumps([config.kind, content], sort_keys=True).encode()).hexdigest()


def fingerprint_model(folder: str) -> str:
    """A hash of a model folder's files, so that changed weights are another model."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"no model folder {folder}: check model.path")
    return fingerprint_files(sorted(file for file in path.iterdir() if file.is_file()))


@lru_cache(maxsize=2)
def load_corpus(config: DataConfig) -> Corpus:
    """Reads or generates all rows.

    Raises:
      UserError: a missing file, a broken row (file and line), or a set that is empty after filtering.
    """
    if config.kind == "toy":
        corpus = Corpus(
            demonstrations=toy.demonstrations(config.toy),
            pairs=toy.preferences(config.toy, test=False),
            held_out=toy.preferences(config.toy, test=True),
            reports=[
                DataReport("toy demonstrations", config.toy.num_demonstrations, config.toy.num_demonstrations),
                DataReport("toy preferences", config.toy.num_pairs, config.toy.num_pairs),
                DataReport("toy test preferences", config.toy.num_test, config.toy.num_test),
            ],
            utility=toy.utility,
        )
    else:
        corpus = _load_files(config)
    empty = [name for name in ("demonstrations", "pairs", "held_out") if not getattr(corpus, name)]
    if empty:
        sources = "; ".join(
            f"{r.source}: read {r.read}, kept {r.kept}, dropped {dict(r.dropped)}" for r in corpus.reports
        )
        raise UserError(
            f"the data set has no {', '.join(empty)} rows. {sources}. Check the files"
            + (" or raise data.validation_fraction or name data.test_path" if "held_out" in empty else "")
        )
    return corpus


def _load_files(config: DataConfig) -> Corpus:
    reports: list[DataReport] = []

    def pairs_from(paths: tuple[str, ...]) -> list[Preference]:
        rows: list[Preference] = []
        for path in paths:
            assert config.kind != "toy"
            more, report = read_pairs_of(
                config.kind, Path(path), strict=config.filter == "strict", max_rows=config.max_rows
            )
            rows += more
            reports.append(report)
        return rows

    def held_out(row: Preference | Demonstration) -> bool:
        return is_validation(row.group, seed=0, fraction=config.validation_fraction)

    rows = pairs_from(config.path)
    tests = pairs_from(config.test_path)
    training = [row for row in rows if not held_out(row)]
    validation = [row for row in rows if held_out(row)]
    demonstrations = [Demonstration(row.prompt, row.chosen, row.group) for row in training]
    if config.sft_path:
        demonstrations = []
        for path in config.sft_path:
            more, report = read_demonstrations(Path(path), max_rows=config.max_rows)
            demonstrations += [row for row in more if not held_out(row)]
            reports.append(report)
    return Corpus(demonstrations, training, tests or validation, reports)


def base_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; a model from scratch uses the toy world's.

    Raises:
      UserError: if rows from files are to be read by a model that has no tokenizer.
    """
    if config.model.path is not None:
        return load_tokenizer(config.model.path)
    if config.data.kind != "toy":
        raise UserError(
            f"data.kind={config.data.kind} needs model.path: a Hugging Face folder whose tokenizer reads the files "
            "(a model from scratch knows only the toy world's words)"
        )
    return toy.make_tokenizer()
