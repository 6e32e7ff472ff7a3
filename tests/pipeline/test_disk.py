"""What a table will take on disk: by hand for made-up sizes, and against a real run."""

from pathlib import Path

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config
from mpo_jax.data import toy
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.pipeline import disk
from mpo_jax.pipeline.basis import Basis
from mpo_jax.pipeline.disk import StageSize, disk_use
from mpo_jax.pipeline.table import TableStage, table_stages
from mpo_jax.runtime.console import console
from mpo_jax.types import trainable
from tests.models.tiny import random_params
from tests.pipeline.test_keeping import CHAIN, NAMES
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.thorough

SIZES = {
    "sft": StageSize(model=10, rows=1, state=60),
    "reward": StageSize(model=9, rows=1, state=54),
    "dpo": StageSize(model=10, rows=1, state=60),
    "ppo": StageSize(model=10, critic=9, rows=1, state=114),
    "evaluate": StageSize(rows=3),
}


def planned(config: Config) -> list[TableStage]:
    return [
        TableStage(0, name, recipe, ("run", recipe["stage"]), ["run"], None if not _there(config, name) else 1.0)
        for name, recipe in CHAIN.items()
    ]


def _there(config: Config, name: str) -> bool:
    return (Path(config.workdir) / "seed-0" / "stages" / name / "manifest.json").is_file()


@pytest.mark.parametrize(("keep", "total", "peak"), [("all", 55, 32 + 1 + 19 + 114), ("last", 35, 32 + 1 + 19 + 114)])
def test_bytes_by_hand(tmp_path, monkeypatch, keep, total, peak):
    """PPO is the largest: beside SFT, reward model and DPO its own models and training state."""
    monkeypatch.setattr(disk.Sizes, "stage", lambda self, stage: SIZES[stage.kind])
    config = Config.model_validate({"workdir": str(tmp_path / "later"), "runtime": {"keep": keep}})
    use = disk_use(config, planned(config))
    assert (use.there, use.total, use.peak, use.at) == (0, total, peak, NAMES["ppo"])
    assert use.free > 2**20 and use.lacking == 0


def test_finished_stages_take_what_they_take(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.Sizes, "stage", lambda self, stage: SIZES[stage.kind])
    config = Config.model_validate({"workdir": str(tmp_path)})
    folder = tmp_path / "seed-0" / "stages" / NAMES["sft"]
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"x" * 50)
    (folder / "manifest.json").write_text("{}")
    use = disk_use(config, planned(config))
    assert use.sizes[NAMES["sft"]] == StageSize(model=50, rows=2) and use.there == 52
    assert use.total == 52 + 55 - 11
    monkeypatch.setattr(disk, "_free", lambda workdir: 100)
    assert disk_use(config, planned(config)).lacking == use.peak - 52 - 100


def test_checkpoints_of_adapters_hold_adapters_alone(tmp_path):
    """By hand, of rank 2 on the attention's four square kernels of each layer; a value head trains beside them."""
    tokenizer = toy.make_tokenizer()
    decoder = loading.scratch_sizes(load_config(MICRO).model.architecture, len(tokenizer))
    loading.save(tmp_path / "base", Model(decoder), trainable(random_params(decoder)), tokenizer)
    adapter = "model.adapter={rank: 2, targets: attention}"
    config = load_config(MICRO, (f"model.path={tmp_path}/base", adapter, f"workdir={tmp_path}/w", "table.seeds=[0]"))
    sizes, width = disk.Sizes(Basis(config)), decoder.hidden_size
    query, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    numbers = decoder.num_layers * 2 * sum(width + out for out in (query, kv, kv, query))
    assert sizes._state("dpo", "lm") == 12 * numbers
    assert sizes._state("reward", "value") == 12 * (numbers + width)


def test_a_table_takes_what_the_dry_run_says(tmp_path):
    """A model large enough that configurations, logs and manifests are some per cent; checkpoints are kept."""
    options = (
        f"workdir={tmp_path}", "seeds=0", "experiment=ppo", "model.architecture.hidden_size=192",
        "model.architecture.intermediate_size=512", "runtime.keep_finished_checkpoints=true",
        "runtime.tensorboard=false",
    )  # fmt: skip
    whole = tuple(f"table.{word}" if word.startswith(("seeds=", "experiment=")) else word for word in options)
    config = load_config(MICRO, whole)
    use = disk_use(config, table_stages(config))
    with console.capture() as captured:
        assert mpo("table", str(MICRO), *options, "--dry-run") == 0
    text = captured.get()
    assert mpo("table", str(MICRO), *options) == 0
    assert f"0 bytes there, {use.total / 1e6:.1f} MB at the end, {use.peak / 1e6:.1f} MB at its peak" in text
    found = disk_use(config, table_stages(config))
    assert found.there == found.total == found.peak
    for name, size in use.sizes.items():
        real = found.sizes[name]
        assert real.model == pytest.approx(size.model, rel=0.01) and real.critic == pytest.approx(size.critic, rel=0.01)
        # Orbax compresses by about 8%: the estimate is on the safe side
        assert size.checkpoints * 0.9 <= real.checkpoints <= size.checkpoints * 1.01 + 1e5, name
    assert 0.9 * use.total < found.there < 1.01 * use.total
