"""A configuration's sets as files: the very rows of every stage, for other trainers, judges and people."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpo_jax.data.corpus import Corpus
from mpo_jax.data.records import Preference
from mpo_jax.data.turns import Turns
from mpo_jax.evaluation.answers import CATEGORY
from mpo_jax.runtime.files import write_lines_together

SETS = ("demonstrations", "pairs", "reward_pairs", "validation", "held_out", "prompts", "test_prompts")
FILES = tuple(f"{name}.jsonl" for name in SETS)


def export_sets(corpus: Corpus, turns: Turns, out: Path) -> dict[str, int]:
    """Writes a file for each of `SETS`, empty ones included: rows {prompt, completion}, {prompt, chosen, rejected} or
    {prompt}, with `category` where a row has one.

    Conversations are lists of messages, as `export_selection` writes them. Texts are whole: stages cut them to their
    lengths.

    Args:
      turns: of the corpus.

    Returns:
      The number of rows of each file.
    """

    def row(prompt: str, responses: Mapping[str, str], category: str | None) -> dict[str, Any]:
        return turns.row(prompt, responses) | ({} if category is None else {CATEGORY: category})

    def pairs(rows: Iterable[Preference]) -> Iterator[dict[str, Any]]:
        return (row(one.prompt, {"chosen": one.chosen, "rejected": one.rejected}, one.category) for one in rows)

    def prompts(rows: Iterable[str]) -> Iterator[dict[str, Any]]:
        return (row(prompt, {}, corpus.category(prompt)) for prompt in rows)

    written = {
        "demonstrations": (
            row(one.prompt, {"completion": one.response}, one.category) for one in corpus.demonstrations
        ),
        "pairs": pairs(corpus.pairs),
        "reward_pairs": pairs(corpus.reward_pairs),
        "validation": pairs(corpus.validation),
        "held_out": pairs(corpus.held_out),
        "prompts": prompts(corpus.prompts),
        "test_prompts": prompts(corpus.test_prompts),
    }
    write_lines_together({out / f"{name}.jsonl": rows for name, rows in written.items()})
    return {f"{name}.jsonl": len(getattr(corpus, name)) for name in SETS}
