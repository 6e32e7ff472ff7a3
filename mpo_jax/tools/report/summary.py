"""The report's first screen: what was run, what came out, and what makes numbers incomparable."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from mpo_jax.config.schema import Config
from mpo_jax.tools.report.curves import distinct
from mpo_jax.tools.report.results import COLUMNS, RunResult
from mpo_jax.tools.report.seeds import BySeed, Rows
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
    """Numbers in a folder's safetensors files, from their headers alone; 0 where there is none."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def best(rows: Rows) -> dict[str, str]:
    """The run with the highest mean reward and the one with the highest true utility, among several."""
    best = {}
    for column in ("score", "utility"):
        having = [row for row in rows if column in row]
        if len(having) > 1:
            best[column] = max(having, key=lambda row: row[column])["run"]
    return best


def verdicts(rows: Rows, claims: Rows) -> Rows:
    """The paper's claims by the true utility where it is known, else by the reward."""
    measure = COLUMNS["utility" if any("utility" in row for row in rows) else "score"]
    return [claim for claim in claims if claim["measure"] == measure]


def outcome(rows: Rows, differences: Rows, best: dict[str, str], *, compare: bool) -> list[str]:
    """What came out, in sentences, by the true utility where it is known, else by the reward: the best run.

    Args:
      compare: include the differences, if there are no claims to test.
    """
    column = "utility" if any("utility" in row for row in rows) else "score"
    name = COLUMNS[column]
    by_run = {row["run"]: row for row in rows}
    sentences = []
    if column in best:
        row = by_run[best[column]]
        error = row[f"{column}_se"]
        shown = "" if error is None else f" ± {error:.3f} (s.e.)"
        sentences.append(f"Best by {name}: {row['run']}, {row[column]:.3f}{shown}.")
    if "utility" in best and "score" in best and best["score"] != best["utility"]:
        sentences.append(f"By reward it would be {best['score']}: the reward model and the truth disagree there.")
    for row in [row for row in differences if row["column"] == column] if compare else []:
        verdict = "no clear difference"
        if row["low"] > 0 or row["high"] < 0:
            verdict = "higher" if row["mean"] > 0 else "lower"
        sentences.append(
            f"{row['run']} against {row['against']}: {verdict}, {row['mean']:+.3f} {name} "
            f"[{row['low']:+.3f}, {row['high']:+.3f}]."
        )
    return sentences


def cautions(by_seed: BySeed) -> list[str]:
    """What makes the runs' numbers incomparable, and the stages' warnings, each once."""
    incomparable = (caution for results in by_seed.values() for caution in _cautions(results))
    return list(dict.fromkeys([*incomparable, *_warnings(by_seed)]))


def _warnings(by_seed: BySeed) -> list[str]:
    """The warnings in the stages' manifests, each with its stage, the runs that use it, and its seed."""
    found = []
    for seed, results in by_seed.items():
        for stage in ("sft", "reward", "select", "dpo", "ppo", "evaluate"):
            for artifact, runs in distinct(results, stage):
                users = ", ".join(runs) if len(runs) < 4 else f"{', '.join(runs[:2])} and {len(runs) - 2} more"
                place = f"{stage} of {users}, seed {seed}"
                found += [f"{place}: {warning}" for warning in artifact.manifest.get("warnings", [])]
    return found


def _cautions(results: list[RunResult]) -> list[str]:
    """What makes the runs' numbers incomparable."""
    manifests = [result.artifacts["evaluate"].manifest for result in results]

    def differ(part: str, key: str | None = None) -> bool:
        values = (manifest.get(part, {}) for manifest in manifests)
        return len({json.dumps(value.get(key) if key else value, sort_keys=True) for value in values}) > 1

    cautions = list(dict.fromkeys(caution for result in results for caution in result.cautions))
    if differ("parents", "reward"):
        cautions.append("The runs were scored by different reward models: their rewards do not compare.")
    if differ("parents", "sft"):
        cautions.append("The runs start from different SFT models: their KL to SFT does not compare.")
    if differ("settings"):
        cautions.append("The runs were evaluated on other data, or with another seed or other settings.")
    return cautions
