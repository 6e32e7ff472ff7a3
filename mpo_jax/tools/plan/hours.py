"""Estimated hours of each stage: a call's estimate times the calls that the data's rows need."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mpo_jax.config.registry import Step
from mpo_jax.config.schema import Config
from mpo_jax.data.corpus import base_tokenizer, load_corpus
from mpo_jax.data.sources import HUB
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.pipeline.stages import count_rows
from mpo_jax.stages.shapes import Amounts
from mpo_jax.tools.plan.measure import Measured, Plan, seconds

EVERYTHING = Step("ppo", "all")
"""DPO on all pairs and PPO on all prompts, the most that a step of an experiment has."""


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Estimated seconds of a stage.

    Attributes:
      expected: with the data's lengths; equal to `full` if they are not known.
      full: with every row at its full width.
      calls: of its longest-running program.
    """

    stage: str
    expected: float
    full: float
    calls: float


def read_amounts(config: Config, *, fetch: bool = False) -> tuple[Amounts | None, str]:
    """Numbers and lengths of the data's rows, and where they come from; None and the reason if data cannot be read.

    Args:
      fetch: whether rows and a tokenizer that are on the hub are fetched.
    """
    data, path = config.data, config.model.path
    if not fetch and any(spec.startswith(HUB) for spec in data.sources):
        return None, "the rows are on the hub: --hours fetches them"
    if not fetch and path is not None and not Path(path).expanduser().exists():
        return None, f"the tokenizer of {path} is on the hub: --hours fetches it"
    try:
        corpus = load_corpus(config)
    except (UserError, OSError) as error:
        return None, f"the rows could not be read: {str(error).splitlines()[0]}"
    try:
        codec = TextCodec(base_tokenizer(config), config.text)
    except (UserError, OSError) as error:
        reason = str(error).splitlines()[0]
        return count_rows(config, corpus), f"every row at full width, since there is no tokenizer: {reason}"
    return count_rows(config, corpus, codec), (
        "rows at the widths of their buckets, by a sample of each set; sampled responses as long as the demonstrations"
    )


def stage_times(measured: Sequence[Measured], plan: Plan, amounts: Amounts) -> list[StageTime]:
    """The time of every stage whose programs were all compiled within memory; none on the CPU.

    Communication is taken as compiled, at full width: most of it gathers weights, whatever the rows' width.
    """
    found = {one.program.name: one for one in measured}
    stages = list(dict.fromkeys(one.program.stage for one in measured))
    times = []
    for stage in stages:
        programs = list(plan.programs([stage], amounts=amounts, step=EVERYTHING))
        if any(p.name not in found or found[p.name].seconds is None for p in programs):
            continue
        expected = full = longest = calls = 0.0
        for program in programs:
            runs, traffic = program.runs or 0.0, found[program.name].traffic
            one = seconds(program.mean_work, traffic, plan.target) or 0.0
            whole = seconds(program.work, traffic, plan.target) or 0.0
            expected, full = expected + runs * one, full + runs * whole
            if runs * whole > longest:
                longest, calls = runs * whole, runs
        times.append(StageTime(stage, expected, full, calls))
    return times
