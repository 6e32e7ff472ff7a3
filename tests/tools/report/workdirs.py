"""Miniature workdirs: the files that finished runs leave, with numbers chosen by hand."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import Config
from mpo_jax.data.pair_table import PairTable
from mpo_jax.evaluation.calibration import write_gaps

SUMMARIES: dict[str, dict[str, float]] = {
    "sft": {"score": -0.125, "score_se": 0.011, "kl": 0.0, "kl_se": 0.0, "length": 15.25, "length_se": 0.5,
            "has_eos": 1.0, "has_eos_se": 0.0, "utility": 2.031, "utility_se": 0.021},
    "dpo": {"score": 1.021, "score_se": 0.012, "kl": 3.701, "kl_se": 0.31, "length": 20.75, "length_se": 0.25,
            "has_eos": 0.931, "has_eos_se": 0.017, "utility": 2.717, "utility_se": 0.022},
    "mpo": {"score": 1.347, "score_se": 0.013, "kl": 1.493, "kl_se": 0.082, "length": 18.5, "length_se": 0.125,
            "has_eos": 0.995, "has_eos_se": 0.003, "utility": 3.307, "utility_se": 0.023},
}  # fmt: skip
STEPS = {"sft": (), "dpo": ("dpo",), "dpo_base": ("dpo",), "dpo_easy": ("dpo",), "ppo": ("ppo",)}
BINS = [
    {"low": 0.0, "high": 0.5, "count": 8, "share": 0.8, "accuracy": 0.625},
    {"low": 0.5, "high": None, "count": 2, "share": 0.2, "accuracy": 1.0},
]
METRICS: dict[str, dict[str, float]] = {
    "sft": {"loss": 2.5},
    "reward": {"loss": 0.6, "accuracy": 0.75},
    "dpo": {"loss": 0.65, "rewards/margins": 0.1, "rewards/accuracies": 0.7, "logps/chosen": -6.5,
            "logps/rejected": -9.0},
    "ppo": {"objective/scores": 1.1, "objective/kl": 0.2, "objective/utility": 2.0, "objective/entropy": 6.0,
            "response_length/mean": 19.0, "critic/explained_variance": 0.1},
}  # fmt: skip
REPORT = {"source": "pairs <b>file</b>", "read": 12, "kept": 10, "dropped": {"empty & void": 2}}


def steps_of(run: str) -> tuple[str, ...]:
    """Stages after SFT; all of MPO's variants have the same two."""
    return STEPS.get(run, ("dpo", "ppo"))


def samples(run: str, prompts: list[str], *, utility: bool = True) -> list[dict[str, Any]]:
    """A row a prompt; run's number shifts every value, so that each number says whose it is."""
    shift = list(SUMMARIES).index(run)
    rows = []
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt, "response": f" {run} answers {index}", "score": index + shift + 0.25}
        row |= {"kl": 0.5, "length": 9, "has_eos": True}
        rows.append(row | ({"utility": 2.0 * index + 0.5 * shift} if utility else {}))
    return rows


def make(
    workdir: Path,
    runs: tuple[str, ...] = ("sft", "dpo", "mpo"),
    *,
    utility: bool = True,
    metrics: bool = False,
    select: bool = False,
    sampled: Mapping[str, list[dict[str, Any]]] | None = None,
    configs: Mapping[str, Config] | None = None,
    reward_ids: Mapping[str, str] | None = None,
    shared: bool = False,
) -> Path:
    """Writes the workdir. Runs share sft, reward and select; `sampled` gives a run's samples instead of the usual.

    Stages of `seed-N` are named `sft-1.N`, but for seed 0; with `shared`, SFT and the reward model have no seed.
    """
    seed = workdir.name.removeprefix("seed-")
    own = f".{seed}" if seed.isdigit() and seed != "0" else ""
    common = "" if shared else own
    prompts = [f"prompt {index}" for index in range(4)]
    for run in runs:
        config = (configs or {}).get(run) or Config(workdir=str(workdir), experiment=runs)  # type: ignore[arg-type]
        reward = (reward_ids or {}).get(run, "reward-1")
        roles = {"sft": f"sft-1{common}", "reward": f"{reward}{common}"}
        roles |= {"select": f"select-1{own}"} if select and steps_of(run) else {}
        roles |= {f"{number + 1}-{stage}": f"{stage}-{run}{own}" for number, stage in enumerate(steps_of(run))}
        roles["evaluate"] = f"evaluate-{run}{own}"
        folder = workdir / "runs" / run
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        environment = {"python": "3.11.0", "packages": {"jax": "0.10.2"}, "devices": ["cpu:0"]}
        command = ["/somewhere/bin/mpo", "run", "my config.yaml"]
        _write_json(folder / "env.json", {**environment, "command": command})
        for role, name in roles.items():
            artifact = workdir / "stages" / name
            parents = {role: roles[role] for role in ("sft", "reward")}
            _artifact(artifact, role, run, utility=utility, metrics=metrics, parents=parents)
            (folder / role).symlink_to(os.path.relpath(artifact, folder), target_is_directory=True)
        rows = (sampled or {}).get(run) or samples(run, prompts, utility=utility)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (workdir / "stages" / roles["evaluate"] / "samples.jsonl").write_text(lines, encoding="utf-8")
    return workdir


def _artifact(folder: Path, role: str, run: str, *, utility: bool, metrics: bool, parents: dict[str, str]) -> None:
    stage = folder.name.split("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    if stage in ("sft", "reward"):
        summary = {"data": [REPORT], "tokens": {"rows": 10, "truncated_prompts": 3, "truncated_responses": 1}}
    if stage == "reward":
        summary |= {"held_out_accuracy": 0.745, "accuracy_by_gap": BINS}
        write_gaps(folder, np.asarray([0.5, -0.5, 2.0]), np.asarray([1.0, 1.0, 1.0]) if utility else None)
        if utility:
            summary |= {"true_accuracy": 0.863, "true_accuracy_by_gap": BINS, "label_accuracy": 0.837}
    if stage == "select":
        pairs(utility=utility).write(folder)
        summary = {"accuracy_by_gap": BINS} if utility else {}
    if stage == "evaluate":
        # runs without numbers of their own have MPO's
        numbers = SUMMARIES.get(run, SUMMARIES["mpo"])
        kept = {key: value for key, value in numbers.items() if utility or not key.startswith("utility")}
        summary = {"prompts": 4, "truncated_prompts": 0, **kept}
    manifest = {"stage": stage, "settings": {"seed": 0}, "parents": parents, "summary": summary}
    _write_json(folder / "manifest.json", manifest)
    if metrics and stage in METRICS:
        # what a run logged, shifted by the run so that lines differ
        shift = [*SUMMARIES, run].index(run) / 10
        rows = [
            {"step": step, **{name: value + shift - step / 100 for name, value in METRICS[stage].items()}}
            for step in (1, 5, 10)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pairs(*, utility: bool) -> PairTable:
    """Five pairs with the gaps 0, 0.5, 1, 1.5 and 2; the truth agrees with the two largest alone."""
    gap = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0], np.float32)
    known = np.asarray([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    return PairTable(
        prompt=[f"prompt {index}" for index in range(5)],
        response=[("a", "b")] * 5,
        ids=[([1], [1])] + [([1], [2])] * 4,
        score=np.stack([gap, np.zeros(5, np.float32)], -1),
        chosen=np.zeros(5, np.int32),
        gap=gap,
        utility=known if utility else np.full((5, 2), np.nan),
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
