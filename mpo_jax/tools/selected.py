"""A selection as files for other trainers: easy and hard pairs, and the hard prompts alone."""

from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.data.pair_table import Border, PairTable
from mpo_jax.data.turns import Turns
from mpo_jax.runtime.files import write_lines_together
from mpo_jax.selection import split

FILES = EASY, HARD, HARD_PROMPTS = "easy.jsonl", "hard.jsonl", "hard_prompts.jsonl"


def export_selection(selection: Path, border: Border, turns: Turns, out: Path) -> dict[str, int]:
    """Writes `easy.jsonl` and `hard.jsonl`, rows {prompt, chosen, rejected, gap, score_chosen, score_rejected}, and
    `hard_prompts.jsonl`, rows {prompt}: what DPO and PPO of the experiment mpo learn from, in the table's order.

    Conversations are lists of messages, with `tools` where they have them, and each of their responses is one message.
    Sampled responses end where they were cut; those of rows that bring their scores are whole.

    Args:
      selection: folder of a finished selection.
      turns: of the corpus that the pairs are from.

    Returns:
      The number of rows of each file.
    """
    table = PairTable.read(selection)
    easy_N = np.asarray(split(table.gap, table.threshold(border)))
    easy, hard = np.flatnonzero(easy_N).tolist(), np.flatnonzero(~easy_N).tolist()
    # files of two selections side by side would be a split that never was
    write_lines_together(
        {
            out / EASY: (_pair(table, row, turns) for row in easy),
            out / HARD: (_pair(table, row, turns) for row in hard),
            out / HARD_PROMPTS: (turns.row(table.prompt[row], {}) for row in hard),
        }
    )
    return {EASY: len(easy), HARD: len(hard), HARD_PROMPTS: len(hard)}


def _pair(table: PairTable, row: int, turns: Turns) -> dict[str, Any]:
    chosen = int(table.chosen[row])
    rejected = 1 - chosen
    responses = table.response[row]
    return {
        **turns.row(table.prompt[row], {"chosen": responses[chosen], "rejected": responses[rejected]}),
        "gap": _shortest(table.gap[row]),
        "score_chosen": _shortest(table.score[row, chosen]),
        "score_rejected": _shortest(table.score[row, rejected]),
    }


def _shortest(value: np.floating) -> float:
    """The number with the fewest digits that is the same float32: 1.2, not 1.2000000476837158."""
    return float(str(np.float32(value)))
