"""Names of runs and their order, and which runs a table is made of."""

import pytest

from mpo_jax.config.registry import EXPERIMENTS
from mpo_jax.config.schema import Config, SelectConfig
from mpo_jax.errors import UserError
from mpo_jax.pipeline.experiments import Variant, in_order, is_run, needs_reward, steps_until, table_variants


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        (Variant("mpo"), "mpo"),
        (Variant("mpo", threshold=2.0), "mpo_t2"),
        (Variant("mpo", threshold=0.25), "mpo_t0.25"),
        (Variant("mpo", threshold=-1.5), "mpo_t-1.5"),
        (Variant("mpo", threshold=1e-7), "mpo_t1e-07"),
        (Variant("mpo", threshold=1.2345678), "mpo_t1.2345678"),
        (Variant("mpo", easy_fraction=0.5), "mpo_f0.5"),
        (Variant("mpo_reverse_sft"), "mpo_reverse_sft"),
        (Variant("dpo_easy", threshold=2.0), "dpo_easy_t2"),
    ],
)
def test_names_lead_back_to_their_variants(variant: Variant, name: str) -> None:
    assert variant.name == name
    assert Variant.of(name) == variant
    assert is_run(name)


@pytest.mark.parametrize("name", ["mpo_t", "mpo_two", "grpo", "mpo_t2_f0.5", "", "seed-0"])
def test_other_names_are_no_runs(name: str) -> None:
    assert not is_run(name)
    with pytest.raises(UserError, match="no run is called"):
        Variant.of(name)


def test_a_variant_splits_where_its_name_says() -> None:
    half = SelectConfig(threshold=None, easy_fraction=0.5, temperature=0.7)
    assert Variant("mpo").select(half) == half
    split = Variant("mpo", threshold=2.0).select(half)
    assert (split.threshold, split.easy_fraction, split.temperature) == (2.0, None, 0.7)
    split = Variant("mpo", easy_fraction=0.25).select(SelectConfig(threshold=1.0))
    assert (split.threshold, split.easy_fraction) == (None, 0.25)


def test_a_table_has_every_run_of_the_paper_in_order() -> None:
    config = Config(table={"thresholds": (3, 1, 2), "easy_fractions": (0.5,)})  # type: ignore[arg-type]
    names = [variant.name for variant in table_variants(config.table, config.select)]
    # threshold 1 is the configuration's own, so it is `mpo`
    assert names == [
        "sft", "dpo_base", "dpo", "ppo", "mpo", "mpo_f0.5", "mpo_t2", "mpo_t3", "mpo_sft_kl", "mpo_reverse",
        "mpo_reverse_sft", "dpo_easy", "dpo_easy_f0.5", "dpo_easy_t2", "dpo_easy_t3", "dpo_hard", "dpo_hard_f0.5",
        "dpo_hard_t2", "dpo_hard_t3", "ppo_easy", "ppo_easy_f0.5", "ppo_easy_t2", "ppo_easy_t3", "ppo_hard",
        "ppo_hard_f0.5", "ppo_hard_t2", "ppo_hard_t3",
    ]  # fmt: skip
    assert set(EXPERIMENTS) < set(names)
    assert in_order(reversed(names)) == names


def test_splits_are_of_runs_that_compare_them() -> None:
    config = Config(table={"experiment": "ppo,sft,mpo_reverse,dpo_easy"})  # type: ignore[arg-type]
    names = [variant.name for variant in table_variants(config.table, config.select)]
    assert names == ["sft", "ppo", "mpo_reverse", "dpo_easy", "dpo_easy_t2"]


@pytest.mark.parametrize(
    ("experiment", "until", "number"),
    [("mpo", "dpo", 1), ("mpo", "ppo", 2), ("mpo_reverse", "dpo", 2), ("mpo", "evaluate", 2), ("mpo", "select", 0)],
)
def test_steps_stop_at_the_last_of_a_kind(experiment: str, until: str, number: int) -> None:
    assert steps_until(experiment, until) == EXPERIMENTS[experiment][:number]


@pytest.mark.parametrize(
    ("experiment", "until", "sampled", "scored"),
    [
        ("dpo_base", "dpo", False, False),
        ("mpo", "sft", False, False),
        ("mpo", "select", True, False),
        ("mpo", "dpo", True, False),
        ("mpo", "ppo", True, True),
        ("ppo", "ppo", True, True),
        ("mpo_reverse", "dpo", True, True),
        ("dpo_base", "evaluate", True, True),
        ("dpo_base", "reward", True, True),
    ],
)
def test_a_reward_model_is_made_only_where_one_is_read(
    experiment: str, until: str, sampled: bool, scored: bool
) -> None:
    assert needs_reward(experiment, until, SelectConfig()) is sampled
    assert needs_reward(experiment, until, SelectConfig(pair_source="scored")) is scored
