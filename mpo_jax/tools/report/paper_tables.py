"""Tables 1 to 6 of the paper and the data of its Figures 2 and 4: our numbers over seeds beside the paper's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mpo_jax.evaluation.calibration import pooled
from mpo_jax.evaluation.statistics import mean_and_se
from mpo_jax.evaluation.verdicts import OUTCOMES
from mpo_jax.pipeline.experiments import Variant
from mpo_jax.tools.report import paper
from mpo_jax.tools.report.paper import NOTHING, Reported
from mpo_jax.tools.report.results import RunResult, split_label
from mpo_jax.tools.report.seeds import BySeed, Rows, of_run, over_seeds, run_names
from mpo_jax.tools.report.verdict_rows import Verdicts, human_rows, judge_rows, reward_rows, vote_shares


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes:
      name: file name without its ending.
      title: the paper's number and what it holds.
      note: what a reader must know; empty cells are explained here.
      rows: one dictionary a row; None is an empty cell.
    """

    name: str
    title: str
    note: str
    rows: Rows


def paper_tables(by_seed: BySeed, verdicts: Verdicts) -> list[PaperTable]:
    """All that the runs and the verdicts on them give something to, in the paper's order."""
    tables = [
        sizes(by_seed),
        reward_accuracy(by_seed),
        accuracy_by_gap(by_seed),
        mean_reward(by_seed),
        judged(by_seed, verdicts),
        human(verdicts),
        variants(by_seed),
        subsets(by_seed),
    ]
    return [table for table in tables if table.rows]


def sizes(by_seed: BySeed) -> PaperTable:
    """Table 1: rows of each kind."""
    rows: Rows = [
        {"data": name, "of": "paper", "train": train, "test": test} for name, (train, test) in paper.SIZES.items()
    ]
    results = next(iter(by_seed.values()))
    found = {
        artifact.manifest["stage"]: artifact.manifest["summary"] for r in results for artifact in r.artifacts.values()
    }
    kept = {stage: found.get(stage, {}).get("tokens", {}).get("rows") for stage in ("sft", "reward")}
    ours = [("demonstrations", kept["sft"], None), ("preference pairs", kept["reward"], None)]
    if "select" in found:
        ours.append(("pairs scored for selection", found["select"].get("pairs"), None))
    ours.append(("held-out prompts", None, found["evaluate"]["prompts"]))
    rows += [{"data": name, "of": "ours, a seed", "train": train, "test": test} for name, train, test in ours]
    return PaperTable("table1", "Table 1: data", "Rows that were trained on and held out, after filtering.", rows)


def reward_accuracy(by_seed: BySeed) -> PaperTable:
    """Table 2: how often the reward model orders held-out pairs as their labels and, where known, the truth do."""
    rows: Rows = []
    firsts = [results[0] for results in by_seed.values()]
    # seeds may share their reward model
    summaries = [*{first.artifacts["reward"].id: first.reward_summary for first in firsts}.values()]
    measures = {
        "held_out_accuracy": "labels",
        "longer_is_chosen": "labels, by the longer response",
        "true_accuracy": "true utility",
        "label_accuracy": "labels against truth",
    }
    pairs = sum(one["count"] for summary in summaries for one in summary.get("accuracy_by_gap") or ())
    for key, name in measures.items():
        values = [summary[key] for summary in summaries if summary.get(key) is not None]
        if values:
            mean, error = mean_and_se(np.asarray(values))
            reported = paper.REWARD_ACCURACY if key == "held_out_accuracy" else NOTHING
            rows.append(
                {
                    "agreement": name,
                    "accuracy": mean,
                    "se_seeds_accuracy": error if len(values) > 1 else None,
                    "seeds": len(values),
                    "pairs": pairs or None,
                    "paper_hh_accuracy": reported.hh,
                    "paper_tldr_accuracy": reported.tldr,
                }
            )
    note = (
        "Share of held-out pairs ordered alike. By the longer response: the one with more characters is the chosen "
        "one, which needs no model. Labels against truth: how far the labels are right."
    )
    return PaperTable("table2", "Table 2: accuracy of the reward model", note, rows)


def gap_bins(by_seed: BySeed) -> dict[str, list[dict[str, Any]]]:
    """Accuracy by gap of each source of pairs, those of all reward models together."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    # over all seeds, which may share their reward model
    seen = set()
    for result in [result for results in by_seed.values() for result in results]:
        for artifact in result.artifacts.values():
            stage, summary = artifact.manifest["stage"], artifact.manifest["summary"]
            # selected pairs name no category
            if artifact.id in seen or stage not in (("reward",) if result.category else ("reward", "select")):
                continue
            summary = result.reward_summary if stage == "reward" else summary
            seen.add(artifact.id)
            source = result.config.select.pair_source
            pairs = {"sampled": "sampled", "human": "labelled", "scored": "scored"}[source]
            names = {
                "accuracy_by_gap": "held-out pairs against their labels",
                "true_accuracy_by_gap": "held-out pairs against the truth",
            }
            if stage == "select":
                names = {"accuracy_by_gap": f"{pairs} pairs against the truth"}
            for key, name in names.items():
                if summary.get(key):
                    found.setdefault(name, []).append(summary[key])
    return {name: pooled(bins) for name, bins in found.items()}


def accuracy_by_gap(by_seed: BySeed) -> PaperTable:
    """Figure 2: number of pairs and accuracy by reward gap."""
    rows: Rows = [{"pairs": name, **one} for name, bins in gap_bins(by_seed).items() for one in bins]
    return PaperTable("figure2", "Figure 2: pairs and accuracy by reward gap", paper.GAPS, rows)


def reported_reward(result: RunResult) -> Reported:
    """Table 3's number of a run; MPO's by its threshold."""
    if result.experiment == "mpo":
        select = result.config.select
        by_threshold = select.easy_fraction is None and select.threshold is not None
        return paper.MPO_REWARD.get(select.threshold or 0.0, NOTHING) if by_threshold else NOTHING
    return paper.MEAN_REWARD.get(result.experiment, NOTHING)


def _reward_rows(by_seed: BySeed, names: list[str], reported: Callable[[RunResult], Reported]) -> Rows:
    over = {row["run"]: row for row in over_seeds(by_seed)}
    rows: Rows = []
    for name in names:
        if name not in over:
            continue
        result, row = next(iter(of_run(by_seed, name).values())), over[name]
        one: dict[str, Any] = {"run": name, "label": result.label, "seeds": row["seeds"], "prompts": row["prompts"]}
        for column, title in (("score", "reward"), ("utility", "utility")):
            if column in row:
                one[title] = row[column]
                one[f"{title}_se_seeds"] = row.get(f"{column}_se_seeds")
                one[f"{title}_se_prompts"] = row[f"{column}_se_prompts"]
            if column == "score":
                # beside our rewards, since they are rewards
                one |= reported(result).cells()
        rows.append(one)
    return rows


SUBSETS = tuple(f"{algorithm}{part}" for algorithm in ("dpo", "ppo") for part in ("_easy", "_hard", ""))
"""Figure 4's experiments in its order."""

ERRORS = (
    "Standard errors: of the spread of the seeds' means (empty with one seed), and over the prompts of these seeds "
    "alone; where seeds share their prompts, the latter is that of values averaged over seeds. The paper's rewards "
    "are of another reward model on another scale: orders and signs compare, sizes do not."
)


def mean_reward(by_seed: BySeed) -> PaperTable:
    """Table 3: mean reward on held-out prompts."""
    names = [name for name in run_names(by_seed) if name in paper.MEAN_REWARD or name.partition("_")[0] == "mpo"]
    names = [name for name in names if name not in ("mpo_sft_kl", "mpo_reverse", "mpo_reverse_sft")]
    return PaperTable("table3", "Table 3: mean reward", ERRORS, _reward_rows(by_seed, names, reported_reward))


def variants(by_seed: BySeed) -> PaperTable:
    """Table 6: MPO and what becomes of it with another reference or the other order."""
    names = ["mpo", "ppo", "mpo_reverse", "mpo_sft_kl", "mpo_reverse_sft"]
    rows = _reward_rows(by_seed, names, lambda result: paper.VARIANT_REWARD.get(result.experiment, NOTHING))
    note = f"The paper has these on HH-RLHF alone. {ERRORS}"
    return PaperTable("table6", "Table 6: variants of MPO", note, rows)


def subsets(by_seed: BySeed) -> PaperTable:
    """Figure 4: DPO and PPO on easy and hard, at every split that was run, and on all."""
    names = [
        name
        for experiment in SUBSETS
        for name in run_names(by_seed)
        if Variant.of(name).experiment == experiment
    ]  # fmt: skip
    rows = _reward_rows(by_seed, names, lambda result: paper.SUBSET_REWARD.get(result.experiment, NOTHING))
    for row in rows:
        result = next(iter(of_run(by_seed, row["run"]).values()))
        algorithm, _, part = result.experiment.partition("_")
        split = split_label(result.config.select) if part else None
        row |= {"algorithm": algorithm.upper(), "subset": part or "all", "split": split}
    note = f"Of the paper's figure only DPO on the easy pairs and on all is known here. {ERRORS} {paper.CONTRADICTION}"
    return PaperTable("figure4", "Figure 4: DPO and PPO on easy, hard and all", note, rows)


def judged(by_seed: BySeed, verdicts: Verdicts) -> PaperTable:
    """Table 4: MPO against PPO, prompt by prompt, and all other comparisons by a judge."""
    rows: Rows = [
        {"of": "paper", "a": "MPO(1)", "b": "PPO", "judge": f"GPT-4, {data}", "win": win, "tie": tie, "lose": lose}
        for data, (win, tie, lose) in paper.JUDGED.items()
    ]
    rows += reward_rows(by_seed, "mpo", "ppo") + judge_rows(verdicts.judged)
    note = (
        "Shares of the held-out prompts on which A wins, ties and loses against B. The run's own reward model is the "
        "one that PPO was trained against, so its verdict is no independent one. Results of `mpo judge` are shown "
        "where they lie in the folder `judge` of the workdir, with 95% Wilson intervals."
    )
    return PaperTable("table4", "Table 4: MPO against PPO, judged", note, rows)


def human(verdicts: Verdicts) -> PaperTable:
    """Table 5: people's verdicts, the paper's and ours."""
    rows: Rows = [
        {"of": "paper", "a": "MPO(1)", "b": "PPO", "category": name, "people": 3,
         **vote_shares(dict(zip(OUTCOMES, votes, strict=True))), "fleiss_kappa": kappa}
        for name, (*votes, kappa) in paper.HUMAN.items()
    ]  # fmt: skip
    rows += human_rows(verdicts.human) or [{"of": "ours", "win": None}]
    note = (
        "A study needs people: `mpo human export A B --out WORKDIR/human/NAME`, then `mpo human import` of the filled "
        "sheets; what lies in the folder `human` of the workdir is shown here. The paper's shares are of votes; those "
        "of items, each by the most votes for it, stand beside them. Intervals are 95%: Wilson's for shares of items, "
        f"a bootstrap over items for kappa; votes for one item are not independent and have none. {paper.CONTRADICTION}"
    )
    return PaperTable("table5", "Table 5: MPO against PPO, judged by people", note, rows)
