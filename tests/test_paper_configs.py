"""The paper's Table 9 against the resolved configurations, number by number; presets keep the global batches."""

from pathlib import Path

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config
from mpo_jax.data.batches import num_steps
from mpo_jax.data.sources import _HUB_PATTERN, HUB

CONFIGS = Path(__file__).parents[1] / "configs"
DEVICES = 8

# what: (HH-RLHF, TL;DR); batches as (a device's rows, micro-batches, rows of all devices)
TABLE_9 = {
    "sft.train.optim.learning_rate": (5e-5, 5e-5),
    "sft.train.optim.warmup_steps": (500, 500),
    "sft.train.optim.weight_decay": (0.0, 0.0),
    "reward.train.optim.learning_rate": (5e-6, 5e-6),
    "reward.train.optim.weight_decay": (0.1, 0.1),
    "reward.train.optim.warmup_steps": (500, 500),
    "dpo.train.optim.learning_rate": (5e-6, 5e-6),
    "dpo.train.optim.weight_decay": (0.1, 0.1),
    "dpo.train.optim.warmup_steps": (100, 100),
    "dpo.beta": (0.1, 0.1),
    "ppo.train.optim.learning_rate": (3e-6, 1e-6),
    "ppo.critic_optim.learning_rate": (5e-6, 3e-6),
    "ppo.train.optim.weight_decay": (0.1, 0.1),
    "ppo.critic_optim.weight_decay": (0.1, 0.1),
    "ppo.train.optim.warmup_steps": (100, 100),
    "ppo.critic_optim.warmup_steps": (100, 100),
    "ppo.kl.coef": (0.4, 0.1),
    "text.max_prompt_tokens": (512, 512),
    "text.max_response_tokens": (512, 128),
}
BATCHES = {
    "sft": ((16, 1, 128), (16, 1, 128)),
    "reward": ((8, 1, 64), (8, 1, 64)),
    "dpo": ((2, 8, 128), (4, 8, 256)),
    "ppo": ((2, 4, 64), (8, 8, 512)),
}
NAMES = ("hh_llama2_7b", "tldr_llama2_7b")
PRESETS = sorted(path.name for path in (CONFIGS / "presets").glob("*.yaml"))


def config(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("key", TABLE_9)
@pytest.mark.parametrize("column", [0, 1], ids=NAMES)
def test_table_9(key, column):
    value = config(NAMES[column])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == TABLE_9[key][column]


@pytest.mark.parametrize("stage", BATCHES)
@pytest.mark.parametrize("column", [0, 1], ids=NAMES)
def test_table_9_s_batches(stage, column):
    resolved = config(NAMES[column])
    train = getattr(resolved, stage).train
    on_a_device, accumulation, together = BATCHES[stage][column]
    assert resolved.mesh.num_devices == resolved.mesh.batch_shards == DEVICES
    assert (train.batch_size, train.accumulation) == (together, accumulation)
    assert train.batch_size // (train.accumulation * DEVICES) == on_a_device


@pytest.mark.parametrize("name", NAMES)
def test_what_the_paper_leaves_open_is_deepspeed_chat_s(name):
    resolved = config(name)
    trains = [getattr(resolved, stage).train for stage in BATCHES]
    for optim in (*(train.optim for train in trains), resolved.ppo.critic_optim):
        assert (optim.beta1, optim.beta2, optim.eps, optim.clip_norm) == (0.9, 0.95, 1e-8, 1.0)
        assert optim.schedule == "cosine"
    assert all(train.epochs == 1 and train.steps is None for train in trains)
    assert (resolved.ppo.epochs, resolved.select.threshold) == (1, 1.0)
    assert (resolved.select.temperature, resolved.select.top_p, resolved.ppo.greedy) == (1.0, 1.0, False)
    assert resolved.model.path == "meta-llama/Llama-2-7b-hf"


def test_policies_are_evaluated_on_the_papers_test_sets():
    for name in NAMES:
        assert config(name).data.prompts == "rows" and config(name).data.validation_fraction == 0.05
    hh, tldr = (config(name).data for name in NAMES)
    assert hh.test_prompt_path == tldr.test_path == () and len(hh.test_path) == 2
    (tests,) = tldr.test_prompt_path
    found = _HUB_PATTERN.fullmatch(tests.removeprefix(HUB))
    assert found is not None and found.group("name", "part", "split") == ("trl-lib/tldr", "", "test")
    assert tldr.has_test_set and not tldr.holds_out, "the validation rows are kept from the reward model alone"


def launch_rows() -> dict[str, list[str]]:
    lines = (CONFIGS.parent / "launch" / "README.md").read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| stage, one epoch"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin : begin + 8]]
    return {row[0]: row[1:] for row in table}


@pytest.mark.parametrize("stage", BATCHES)
@pytest.mark.parametrize("column", [0, 5], ids=NAMES)
def test_the_launch_table_counts_updates_as_the_stages_do(stage, column):
    names = {"sft": "SFT", "reward": "reward model", "dpo": "DPO on all pairs", "ppo": "PPO on all prompts"}
    (row,) = (cells for name, cells in launch_rows().items() if name.startswith(names[stage]))
    rows, updates = (int(cell.split()[0].replace(",", "")) for cell in row[column : column + 2])
    train = getattr(config(NAMES[column > 0]), stage).train
    assert updates == num_steps(rows, epochs=train.epochs, steps=train.steps, batch_size=train.batch_size)


def test_the_launch_table_counts_the_papers_rows():
    rows = [[int(row[i].split()[0].replace(",", "")) for i in (0, 5)] for row in list(launch_rows().values())[2:]]
    sft, reward, selection, dpo, ppo, evaluation = rows
    comparisons = 92858 + 86086 - 2284
    assert sft == [43774 + 42537, 116722] and evaluation == [2352 + 2312, 6553]
    assert selection == dpo == ppo == [sft[0], comparisons]
    assert reward == [round(0.95 * sft[0]), round(0.95 * comparisons)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_presets_change_no_global_batch(name, preset):
    plain, changed = config(name), config(name, str(CONFIGS / "presets" / preset))
    shards = changed.mesh.batch_shards
    for stage in BATCHES:
        train = getattr(changed, stage).train
        assert train.batch_size == getattr(plain, stage).train.batch_size
        assert train.batch_size // train.accumulation % shards == 0, "a micro-batch divides over the mesh"
        optim = getattr(plain, stage).train.optim
        if preset == "lora.yaml":
            # adapters learn at higher rates, which are all that this preset changes
            assert train.optim.learning_rate > optim.learning_rate
            optim = optim.model_copy(update={"learning_rate": train.optim.learning_rate})
        assert train.optim == optim
    assert changed.select.batch_size % shards == changed.evaluate.batch_size % shards == 0
    assert changed.text == plain.text


@pytest.mark.parametrize(("preset", "devices"), [(None, 64), ("tpu_v5p_128.yaml", 128)])
def test_the_70b_run_has_the_7b_run_s_batches_and_fits_its_meshes(preset, devices):
    plain = config("hh_llama2_7b")
    large = config("hh_llama2_70b", *([] if preset is None else [str(CONFIGS / "presets" / preset)]))
    assert large.mesh.num_devices == devices and (large.data, large.text) == (plain.data, plain.text)
    for stage in BATCHES:
        train = getattr(large, stage).train
        assert train.batch_size == getattr(plain, stage).train.batch_size
        assert train.batch_size // train.accumulation % large.mesh.batch_shards == 0


def test_ds_chat_is_greedy_and_rewards_after_the_end():
    changed = config("hh_llama2_7b", str(CONFIGS / "presets" / "ds_chat.yaml"))
    assert (changed.ppo.greedy, changed.ppo.reward_at) == (True, "ds_chat")
    assert changed.reward.loss == "ds_span"
    assert changed.mesh == config("hh_llama2_7b").mesh


@pytest.mark.parametrize(
    "name",
    [
        "quickstart", "hh_stories260k", "hh_smollm2", "tldr_smollm2", "hh_smollm2_cpu", "tldr_smollm2_cpu",
        "hh_llama2_7b", "tldr_llama2_7b",
    ],
)  # fmt: skip
def test_every_method_sees_the_same_prompts_once(name):
    """Equal data, as the paper says: an epoch each of DPO and PPO, not a number of updates."""
    config = load_config(CONFIGS / f"{name}.yaml")
    for train in (config.dpo.train, config.ppo.train):
        assert (train.steps, train.epochs) == (None, 1.0)
    assert config.ppo.epochs == 1
