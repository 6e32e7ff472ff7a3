"""The report's first screen: what was run, what came out, and what makes numbers incomparable."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mpo_jax.config.schema import Config
from mpo_jax.tools.report.curves import distinct_by_seed
from mpo_jax.tools.report.provenance import mixed_settings
from mpo_jax.tools.report.results import COLUMNS, RunResult
from mpo_jax.tools.report.seeds import BySeed, Rows, differences
from mpo_jax.types import Artifact

DATA_KINDS = {
    "toy": "the toy TL;DR world",
    "hh": "preference pairs in the HH-RLHF format",
    "tldr": "Reddit posts with summaries (TL;DR)",
    "pairs": "preference pairs from local files",
}


def what(by_seed: BySeed, rows: Rows) -> str:
    """What was run, in plain words."""
    results = [result for part in by_seed.values() for result in part]
    kinds = list(dict.fromkeys(DATA_KINDS.get(kind := result.config.data.kind, f"{kind} rows") for result in results))
    models = list(dict.fromkeys(_model(result.config, result.artifacts.values()) for result in results))
    seeds = sorted({result.config.seed for result in results})
    names = ", ".join(row["run"] for row in rows)
    answered = sorted({result.summary["prompts"] for result in results})
    return (
        f"{len(rows)} run{'s' * (len(rows) > 1)} ({names}) on {' and '.join(kinds)}, with "
        f"{' and '.join(models)}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. Each final policy "
        f"answered {' or '.join(map(str, answered))} held-out prompts."
    )


def _model(config: Config, artifacts: Iterable[Artifact]) -> str:
    # the first policy whose model is there: all are of one size, and parents' may have been removed
    policies = (one for one in artifacts if one.manifest["stage"] in ("sft", "dpo", "ppo"))
    size = next((size for one in policies if (size := _num_parameters(one.model))), 0)
    sized = f"{size / 1e9:.2f} billion" if size >= 1e9 else f"{size / 1e6:.2f} million"
    count = f" of {sized} parameters" if size else ""
    if config.model.path is not None:
        return f"the base model {Path(config.model.path).name}{count}"
    shape = config.model.architecture
    return f"a model{count} trained from scratch ({shape.num_layers} layers, width {shape.hidden_size})"


def _num_parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, from their headers alone; 0 where there is none, or one is damaged."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "np") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return 0
    return total


def best(rows: Rows) -> dict[str, str]:
    """The run with the highest mean reward and the one with the highest true utility, among several."""
    best = {}
    for column in ("score", "utility"):
        having = [row for row in rows if column in row]
        if len(having) > 1:
            best[column] = max(having, key=lambda row: row[column])["run"]
    return best


def measure(rows: Rows) -> str:
    """The column that runs are compared by: the true utility where it is known, else the reward."""
    return "utility" if any("utility" in row for row in rows) else "score"


def verdict(by_seed: BySeed, rows: Rows, *, resamples: int) -> str:
    """The outcome in a sentence: the best run, and how far it is above SFT and the next.

    Means alone say which run is best; the differences are paired by prompt, and are clear where their 95% interval
    leaves out zero.
    """
    column = measure(rows)
    name = COLUMNS[column]
    ranked = sorted((row for row in rows if column in row), key=lambda row: -row[column])
    best = ranked[0]["run"]
    if len(ranked) == 1:
        error = ranked[0][f"{column}_se"]
        spread = "" if error is None else f" ± {error:.3f}"
        return f"{best} reaches a {name} of {ranked[0][column]:.3f}{spread}; there is no other run to compare it with."
    if obstacles := [one for results in by_seed.values() for one in _obstacles(results, column)]:
        return f"The runs cannot be ranked by {name}: {obstacles[0]}."

    def above(other: str) -> str:
        found = differences(by_seed, best, other, column)
        if found is None:
            return f"without a prompt in common with {other}"
        mean, low, high, _ = found.interval(resamples=resamples)
        clear = "clearly above" if low > 0 else "not clearly above"
        return f"{clear} {other} ({mean:+.3f} [{low:+.3f}, {high:+.3f}])"

    second = ranked[1]["run"]
    if best == "sft":
        return f"No run has a higher {name} than sft, which is {above(second)}."
    others = ["sft"] if any(row["run"] == "sft" for row in ranked) else []
    return f"{best} has the highest {name}, {' and '.join(map(above, dict.fromkeys([*others, second])))}."


def disagreement(best: dict[str, str]) -> str | None:
    """A sentence where the reward model and the truth prefer different runs."""
    if len(best) < 2 or best["score"] == best["utility"]:
        return None
    return f"By reward the best run is {best['score']}: reward model and truth disagree there."


def gains(rows: Rows, compared: Rows) -> list[dict[str, Any]]:
    """A row a run: its means, and under `gain` by column the differences to SFT; empty where SFT is not among them.

    SFT itself has no gain.
    """
    against = [row for row in compared if row["against"] == "sft"]
    if not against:
        return []
    found = {row["run"]: {**row, "gain": {}} for row in rows}
    for row in against:
        found[row["run"]]["gain"][row["column"]] = row
    return list(found.values())


def cautions(by_seed: BySeed) -> list[str]:
    """What makes the runs' numbers incomparable, and the stages' warnings, each once."""
    incomparable = (caution for results in by_seed.values() for caution in _cautions(results))
    return list(dict.fromkeys([*mixed_settings(by_seed), *incomparable, *warnings(by_seed)]))


def warnings(by_seed: BySeed) -> list[str]:
    """The warnings in the stages' manifests, each with its stage, the runs that use it, and its seed."""
    found = []
    stages = [distinct_by_seed(by_seed, stage) for stage in ("sft", "reward", "select", "dpo", "ppo", "evaluate")]
    for seed in by_seed:
        for made in stages:
            for artifact, runs in made[seed]:
                stage = artifact.manifest["stage"]
                users = ", ".join(runs) if len(runs) < 4 else f"{', '.join(runs[:2])} and {len(runs) - 2} more"
                place = f"{stage} of {users}, seed {seed}"
                found += [f"{place}: {warning}" for warning in artifact.manifest.get("warnings", [])]
    return found


def _obstacles(results: list[RunResult], column: str) -> list[str]:
    """What makes one column incomparable between the runs of a seed."""
    manifests = [result.artifacts["evaluate"].manifest for result in results]
    found = []
    if column == "score" and _differ(manifests, "parents", "reward"):
        found.append("different reward models scored them")
    if _differ(manifests, "settings"):
        found.append("they were evaluated on other data, or with another seed or other settings")
    return found


def _differ(manifests: list[dict[str, Any]], part: str, key: str | None = None) -> bool:
    values = (manifest.get(part, {}) for manifest in manifests)
    return len({json.dumps(value.get(key) if key else value, sort_keys=True) for value in values}) > 1


def _cautions(results: list[RunResult]) -> list[str]:
    """What makes the runs' numbers incomparable."""
    manifests = [result.artifacts["evaluate"].manifest for result in results]
    cautions = list(dict.fromkeys(caution for result in results for caution in result.cautions))
    if _differ(manifests, "parents", "reward"):
        cautions.append("The runs were scored by different reward models: their rewards do not compare.")
    if _differ(manifests, "parents", "sft"):
        cautions.append("The runs start from different SFT models: their KL to SFT does not compare.")
    if _differ(manifests, "settings"):
        cautions.append("The runs were evaluated on other data, or with another seed or other settings.")
    return cautions
