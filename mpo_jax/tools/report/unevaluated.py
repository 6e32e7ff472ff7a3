"""Runs that were made up to some stage: what they have, without the evaluation that the report is made of."""

from collections.abc import Iterator
from pathlib import Path

from mpo_jax.pipeline.experiments import in_order, is_run
from mpo_jax.pipeline.run_folder import roles
from mpo_jax.runtime.files import anew, read_lines, read_object

SHOWN = (
    "loss", "accuracy", "rewards/accuracies", "rewards/margins", "objective/scores", "objective/kl",
)  # fmt: skip
"""The measures of training that are shown, beside those on held-out rows."""


def unevaluated(workdir: Path) -> list[str]:
    """The names of the runs without an evaluation, in the order of the tables."""
    runs = (run for run in (workdir / "runs").glob("*") if is_run(run.name) and (run / "config.yaml").is_file())
    return in_order(run.name for run in runs if "evaluate" not in roles(run))


def stage_lines(workdir: Path, run: str) -> Iterator[str]:
    """A line for each stage of a run: its folder, its time, and what its training ended with."""
    folders = [link for link in (workdir / "runs" / run).iterdir() if (link / "manifest.json").is_file()]
    manifests = {folder: read_object(folder / "manifest.json", anew(folder)) for folder in folders}
    # numbered steps come last, and are nine at most
    order = {"sft": "", "reward": " ", "select": "  "}
    for folder in sorted(folders, key=lambda folder: order.get(folder.name, folder.name)):
        measured = ", ".join(f"{name} {value:.4g}" for name, value in _last(folder / "metrics.jsonl").items())
        seconds = f"{manifests[folder].get('seconds', 0):.0f} s"
        yield f"{folder.name}: {folder.resolve()}, {seconds}{f': {measured}' if measured else ''}"


def _last(metrics: Path) -> dict[str, float]:
    """The last value of each shown measure."""
    found: dict[str, float] = {}
    if metrics.is_file() and metrics.stat().st_size:
        for values in read_lines(metrics, anew(metrics.parent)):
            found |= {name: x for name, x in values.items() if name in SHOWN or name.startswith("eval/")}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
