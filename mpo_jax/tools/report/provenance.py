"""Where a report's numbers come from: sources, cuts, configurations and how they differ, machines, commands."""

import json
import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mpo_jax.config.registry import EXPERIMENTS, Step
from mpo_jax.config.schema import Config
from mpo_jax.errors import Damaged
from mpo_jax.pipeline.experiments import table_variants
from mpo_jax.pipeline.run_folder import CONFIG, read_config
from mpo_jax.tools.report.curves import distinct
from mpo_jax.tools.report.results import RunResult, split_label
from mpo_jax.tools.report.seeds import BySeed, Rows, of_run, run_names
from mpo_jax.tools.report.shown import Shown
from mpo_jax.tools.report.unevaluated import in_order_made

TABLE_CONFIG = "table.yaml"
"""In a table's workdir: the resolved configuration that `mpo table` was given."""


def sources(shown: Shown, results: list[RunResult]) -> Rows:
    """What was read, kept and dropped, a row a source."""
    found = {
        json.dumps(source, sort_keys=True): source
        for stage in ("sft", "reward")
        for artifact, _ in distinct(results, stage)
        for source in artifact.manifest["summary"].get("data", [])
    }
    rows = list(found.values())
    shown.table("data", [{**row, "dropped": json.dumps(row["dropped"], sort_keys=True)} for row in rows])
    return rows


def truncation(shown: Shown, results: list[RunResult]) -> Rows:
    """How many texts were cut to the token limits, a row for each artifact that records it."""
    rows: Rows = []
    for stage in ("sft", "reward"):
        for artifact, _ in distinct(results, stage):
            if "tokens" in artifact.manifest["summary"]:
                rows.append({"artifact": artifact.id, **artifact.manifest["summary"]["tokens"]})
    for artifact, _ in distinct(results, "evaluate"):
        summary = artifact.manifest["summary"]
        if "truncated_prompts" in summary:
            cut = {"rows": summary["prompts"], "truncated_prompts": summary["truncated_prompts"]}
            rows.append({"artifact": artifact.id, **cut})
    return shown.table("truncation", rows)


def steps(by_seed: BySeed) -> Rows:
    """What each run does, in words, a row a run."""
    rows: Rows = []
    for results in by_seed.values():
        for result in results:
            if all(row["run"] != result.name for row in rows):
                made = [_step(step) for step in EXPERIMENTS[result.experiment]]  # type: ignore[index]
                splits = any(step.subset != "all" for step in EXPERIMENTS[result.experiment])  # type: ignore[index]
                split = split_label(result.config.select) if splits else None
                rows.append({"run": result.name, "steps": ", then ".join(made) or "no further step", "split": split})
    return rows


def _step(step: Step) -> str:
    if step.human_pairs:
        return "DPO on human pairs"
    rows = {"dpo": "pairs", "ppo": "prompts"}[step.algorithm]
    reference = ", reference SFT" if step.reference == "sft" else ""
    return f"{step.algorithm.upper()} on {step.subset} {rows}{reference}"


def config_differences(by_seed: BySeed) -> Rows:
    """Keys in which the runs' configurations differ, a row a key and value with the runs that have it.

    Keys that name the runs but do not affect them are left out: the workdir, and the list of experiments.
    """
    flat: dict[str, dict[str, Any]] = {}
    for seed, results in by_seed.items():
        for result in results:
            prefix = f"seed {seed}: " if len(by_seed) > 1 else ""
            flat[f"{prefix}{result.name}"] = _flat(result.config.model_dump(mode="json"))
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows: Rows = []
    for key in keys:
        users: dict[str, list[str]] = {}
        for run, values in flat.items():
            users.setdefault(json.dumps(values.get(key)), []).append(run)
        if len(users) > 1:
            rows += [{"key": key, "value": value, "runs": ", ".join(runs)} for value, runs in users.items()]
    return rows


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in ("workdir", "experiment", "table"):
            continue
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def environments(results: list[RunResult]) -> list[dict[str, Any]]:
    """The different machines and versions, each with the runs that it made; commands are listed elsewhere."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        if result.environment:
            env = {key: value for key, value in result.environment.items() if key != "command"}
            one = found.setdefault(json.dumps(env, sort_keys=True), {"runs": [], "env": env})
            one["runs"].append(result.name)
    return list(found.values())


def is_comparable_to_paper(workdir: Path, by_seed: BySeed) -> bool:
    """Whether the paper's tables belong beside the runs: they are a table's, or on data of the paper's kinds."""
    kinds = {result.config.data.kind for results in by_seed.values() for result in results}
    return len(by_seed) > 1 or (workdir / TABLE_CONFIG).is_file() or bool(kinds & {"hh", "tldr"})


def commands(workdir: Path, by_seed: BySeed) -> list[dict[str, Any]]:
    """For each different configuration: the command that was given, and the one that repeats it from what is kept.

    A table is repeated as a whole, if its last call was for all of these seeds and runs.
    """
    if len(by_seed) > 1 and _last_call_makes(workdir, by_seed):
        results = next(iter(by_seed.values()))
        names = [result.name for part in by_seed.values() for result in part]
        again = ["mpo", "table", str(workdir / TABLE_CONFIG), f"workdir={workdir}-again"]
        command = {"runs": list(dict.fromkeys(names)), "seed": ", ".join(map(str, by_seed)), "world_seed": None}
        return [{**command, "given": _given(results[0]), "again": shlex.join(again)}]
    found: dict[tuple[Config, str], dict[str, Any]] = {}
    for result in [result for results in by_seed.values() for result in results]:
        config, stage = result.config, _made_up_to(result)
        command = {
            "runs": [],
            "seed": config.seed,
            "world_seed": config.data.toy.seed if config.data.kind == "toy" else None,
            "given": _given(result),
            "again": shlex.join(["mpo", stage, str(result.folder / CONFIG), f"workdir={config.workdir}-again"]),
        }
        found.setdefault((config, stage), command)["runs"].append(result.name)
    return list(found.values())


def _last_call_makes(workdir: Path, by_seed: BySeed) -> bool:
    """Whether the configuration that `mpo table` was given last makes these runs."""
    try:
        config = read_config(workdir / TABLE_CONFIG)
    except Damaged:
        return False
    runs = {variant.name for variant in table_variants(config.table, config.select)}
    every = [result for results in by_seed.values() for result in results]
    return (
        {*by_seed} == {*config.table.seeds}
        and {result.name for result in every} <= runs
        and all(_own_keys(result.config) == _own_keys(config) for result in every)
    )


def mixed_settings(by_seed: BySeed) -> list[str]:
    """A sentence for each run whose seeds were made with settings that differ in more than the seed."""
    found = []
    for name in run_names(by_seed):
        made = [_settings(result) for result in of_run(by_seed, name).values()]
        keys = dict.fromkeys(key for settings in made for key in settings)
        if differing := [key for key in keys if len({json.dumps(settings.get(key)) for settings in made}) > 1]:
            found.append(f"{name}: its mean is over seeds of different settings ({', '.join(differing)})")
    return found


def _settings(result: RunResult) -> dict[str, Any]:
    """What a run's stages were made with, by role: all that their names stand for but seeds, rows and parents."""
    stages = {role: artifact.manifest.get("settings", {}) for role, artifact in result.artifacts.items()}
    return _flat({role: {key: x for key, x in found.items() if key != "seed"} for role, found in stages.items()})


def _own_keys(config: Config) -> dict[str, Any]:
    """A run's configuration without its seeds, its own split and the machine."""
    own = ("seed", "data.toy.seed", "select.threshold", "select.easy_fraction")
    flat = _flat(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if key not in own and not key.startswith("runtime.")}


def evaluation(result: RunResult) -> str:
    """The command that goes on with a run that was made up to a stage, to its evaluation."""
    return shlex.join(["mpo", "evaluate", str(result.folder / CONFIG)])


def _made_up_to(result: RunResult) -> str:
    """The command that makes as much as there is of a run: `run` for all of it, or a stage's name."""
    if "evaluate" in result.artifacts:
        return "run"
    return result.artifacts[in_order_made(result)[-1]].manifest["stage"]


def _given(result: RunResult) -> str:
    """The command that the run was made by."""
    given = result.environment.get("command", [])
    return shlex.join(["mpo", *given[1:]]) if len(given) > 1 else ""


def policy(workdir: Path, result: RunResult) -> dict[str, Any]:
    """Where a run's final policy is: as people read it, as seen from the report's folder, and whether it is there."""
    steps = sorted((role for role in result.artifacts if role[0].isdigit()), key=lambda role: int(role.split("-")[0]))
    artifact = result.artifacts[steps[-1] if steps else "sft"]
    kept = artifact.model.is_dir()
    folder = artifact.model if kept else artifact.path
    base = workdir.resolve()
    address = quote(os.path.relpath(folder, base / "report")) + "/"
    return {"run": result.name, "path": os.path.relpath(folder, base), "address": address, "kept": kept}


def artifacts(workdir: Path, by_seed: BySeed) -> Rows:
    """Every run's artifacts by role, in the order they are made, with addresses as seen from the report's folder."""
    order = {"sft": 0, "reward": 1, "select": 2, "evaluate": 4}
    rows: Rows = []
    for seed, results in by_seed.items():
        for result in results:
            roles = sorted(result.artifacts.items(), key=lambda item: order.get(item[0], 3))
            # artifact paths have no links in them, so the folder that they are seen from must not either
            address = {role: os.path.relpath(artifact.path, workdir.resolve() / "report") for role, artifact in roles}
            links = [(role, artifact.id, quote(address[role]) + "/") for role, artifact in roles]
            rows.append({"seed": seed, "run": result.name, "artifacts": links})
    return rows
