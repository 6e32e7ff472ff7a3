"""Warnings: shown at once, kept in the manifest of the stage that is made; and what stages warn of."""

from pathlib import Path

import numpy as np
import pytest

from mpo_jax.config.schema import Config, ModelConfig, OptimConfig, SelectConfig
from mpo_jax.data.pair_table import PairTable, check_subsets
from mpo_jax.data.tokens import TokenReport
from mpo_jax.errors import NothingSelected
from mpo_jax.pipeline.artifacts import Store
from mpo_jax.pipeline.recipe import make_recipe
from mpo_jax.runtime.stage_warnings import collect_warnings, warn
from mpo_jax.stages import sft
from mpo_jax.stages.context import Context, Inputs
from mpo_jax.stages.fitting import check_rows, check_schedule
from tests.models.tiny import mesh_of


def table_of(*gaps: float) -> PairTable:
    num = len(gaps)
    score = np.stack([np.asarray(gaps, np.float32), np.zeros(num, np.float32)], 1)
    texts, ids = [("a", "b")] * num, [([1], [2])] * num
    return PairTable(["p"] * num, texts, ids, score, np.zeros(num, np.int32), score[:, 0], np.full((num, 2), np.nan))


def test_a_warning_is_shown_and_stays_in_the_manifest(tmp_path, capsys):
    def run(folder):
        warn("too few [rows]")
        warn("too few [rows]")
        return {}

    store = Store(tmp_path)
    noisy = store.build(make_recipe("sft", {"rows": 1}, {}, {}), run)
    quiet = store.build(make_recipe("sft", {"rows": 9}, {}, {}), lambda folder: {})
    assert (noisy.manifest["warnings"], quiet.manifest["warnings"]) == (["too few [rows]"], [])
    assert capsys.readouterr().out.count("warning: too few [rows]") == 1


def test_outside_a_stage_it_is_shown_alone(capsys):
    warn("look")
    assert "warning: look" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optim", "updates", "says"),
    [
        ({"warmup_steps": None}, 20, []),
        ({"warmup_steps": None}, 19, ["dpo makes 19 updates"]),
        ({"warmup_steps": 6}, 20, []),
        ({"warmup_steps": 7}, 20, ["dpo.train.optim.warmup_steps=7 is 35% of the 20 updates: lower"]),
        ({"warmup_steps": 500}, 30, ["warmup_steps=500 is 1667% of the 30 updates and is shortened to 29: lower"]),
        ({"warmup_steps": 500, "schedule": "constant"}, 30, ["warmup_steps=500 is 1667% of the 30 updates: lower"]),
        ({"warmup_steps": 500}, 674, ["warmup_steps=500 is 74% of the 674 updates"]),  # SFT on HH-RLHF in the paper
    ],
)
def test_few_updates_and_long_warm_ups(optim, updates, says):
    with collect_warnings() as warnings:
        check_schedule("dpo.train.optim", OptimConfig(**optim), updates)
    assert len(warnings) == len(says)
    assert all(text in warning for text, warning in zip(says, warnings, strict=True))


def test_a_batch_that_holds_rows_twice():
    with collect_warnings() as warnings:
        check_rows("dpo", 32, 32)
        check_rows("dpo", 5, 32)
    assert len(warnings) == 1 and "dpo has 5 rows for batches of 32" in warnings[0]


def test_a_pretrained_model_on_the_toy_world_and_prompts_that_are_cut():
    few = TokenReport(rows=10, truncated_prompts=5)

    def look(config, report):
        context = Context(mesh=mesh_of(1, 1, 1), folder=Path("."), inputs=Inputs(config, sft.STAGE.inputs))
        sft._warn_of_inputs(sft.Settings.of(config), context, report)

    with collect_warnings() as warnings:
        look(Config(), few)
        assert not warnings
        look(Config(model=ModelConfig(path="somewhere")), few)
        look(Config(), TokenReport(rows=10, truncated_prompts=6))
    first, second = warnings
    assert "a pretrained model learns the toy world" in first
    assert second == "6 of 10 demonstrations' prompts are cut to text.max_prompt_tokens=512: raise it"


@pytest.mark.parametrize(("threshold", "empty"), [(1.0, None), (5.0, "easy"), (0.1, "hard")])
def test_an_empty_side_of_the_split(tmp_path, threshold, empty):
    table, config = table_of(0.5, 1.5, 2.0), SelectConfig(threshold=threshold)
    table.write(tmp_path)
    with collect_warnings() as warnings:
        table.warn_if_one_sided(config)
    assert [warning.split(" at ")[0] for warning in warnings] == ([f"no pair is {empty}"] if empty else [])
    check_subsets(tmp_path, ["all"], config)
    for side in ("easy", "hard"):
        if side == empty:
            with pytest.raises(NothingSelected, match=f"no pair is {side} at threshold {threshold:g}"):
                check_subsets(tmp_path, [side], config)
        else:
            check_subsets(tmp_path, [side], config)


def test_a_stage_that_trains_on_one_side_says_that_the_other_is_empty():
    with collect_warnings() as warnings:
        rows = table_of(0.5, 1.5).rows("easy", SelectConfig(threshold=0.1))
    assert rows.tolist() == [0, 1] and "no pair is hard" in warnings[0]


def test_defaults_are_the_paper_s_by_stage():
    """Table 9, HH-RLHF."""
    config = Config()
    optims = {
        "sft": config.sft.train.optim,
        "reward": config.reward.train.optim,
        "dpo": config.dpo.train.optim,
        "actor": config.ppo.train.optim,
        "critic": config.ppo.critic_optim,
    }
    assert {name: optim.learning_rate for name, optim in optims.items()} == {
        "sft": 5e-5, "reward": 5e-6, "dpo": 5e-6, "actor": 3e-6, "critic": 5e-6,
    }  # fmt: skip
    assert [optim.weight_decay for optim in optims.values()] == [0.0, 0.1, 0.1, 0.1, 0.1]
    assert (config.dpo.beta, config.ppo.kl.coef) == (0.1, 0.4)
