"""Runs that were made up to some stage: what their training ended with, without the evaluation."""

from typing import Any

from mpo_jax.config.schema import EVAL
from mpo_jax.tools.report.curves import metrics
from mpo_jax.tools.report.results import RunResult
from mpo_jax.tools.report.seeds import Rows

SHOWN = (
    "loss", "accuracy", "rewards/accuracies", "rewards/margins", "objective/scores", "objective/kl",
)  # fmt: skip
"""The measures of training that are shown, beside those on held-out rows."""


def last_measures(result: RunResult) -> Rows:
    """A row for each of a run's stages that trained: the last value of each shown measure."""
    return [
        {"run": result.name, "stage": role, "artifact": result.artifacts[role].id, **found}
        for role in in_order_made(result)
        if (found := _last(metrics(result.artifacts[role])))
    ]


def in_order_made(result: RunResult) -> list[str]:
    """A run's roles in the order in which its stages are made."""
    # numbered steps come last, and are nine at most
    order = {"sft": "", "reward": " ", "select": "  "}
    return sorted(result.artifacts, key=lambda role: order.get(role, role))


def _last(rows: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, Any] = {}
    for values in rows:
        found |= {name: x for name, x in values.items() if name in SHOWN or name.startswith(EVAL)}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
