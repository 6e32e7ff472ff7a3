"""Evaluation's samples hold the prompt that the policy read, and numbers that are not finite end it."""

import json

import jax
import pytest

from mpo_jax.config.schema import Config
from mpo_jax.errors import NotFinite
from mpo_jax.stages import evaluate, select
from mpo_jax.stages.context import Context, Inputs
from mpo_jax.types import Artifact
from tests.cli.conftest import damaged, decoder, language_model, reward_model  # noqa: F401 (fixtures)
from tests.models.tiny import mesh_of

TEMPLATE = "my boss: {prompt}"
CONFIG = Config.model_validate(
    {
        "text": {
            "prompt_template": TEMPLATE,
            "max_prompt_tokens": 80,
            "max_response_tokens": 4,
            "length_buckets": 1,
        },
        "data": {"toy": {"num_demonstrations": 4, "num_pairs": 4, "num_test": 4}},
        "evaluate": {"batch_size": 4},
        "select": {"batch_size": 4},
    }
)


@pytest.fixture
def artifacts(tmp_path, language_model, reward_model):  # noqa: F811
    """A policy and a reward model as a run's stages leave them; the reward model, or the policy, damaged."""

    def make(spoilt=None):
        made = []
        for name, model in (("sft", language_model), ("reward", reward_model)):
            folder = tmp_path / str(spoilt) / name
            folder.mkdir(parents=True)
            if name == spoilt:
                damaged(model, folder / "model")
            else:
                (folder / "model").symlink_to(model)
            made.append(Artifact(folder, {}))
        return made

    return make


def run(stage, folder, sft, reward):
    """The module's stage with the configuration's settings."""
    parents = {"sft": sft, "reward": reward} | ({"policy": sft} if stage is evaluate else {})
    mesh = mesh_of(1, 1, 1)
    context = Context(mesh=mesh, folder=folder, inputs=Inputs(CONFIG, stage.STAGE.inputs))
    with jax.set_mesh(mesh):
        return stage.run(stage.Settings.of(CONFIG), parents, context)


def test_samples_hold_the_prompt_as_the_policy_read_it(artifacts, tmp_path):
    run(evaluate, tmp_path, *artifacts())
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows and all(row["shown"] == TEMPLATE.replace("{prompt}", row["prompt"]) for row in rows)


@pytest.mark.parametrize("stage", [evaluate, select], ids=["evaluate", "select"])
@pytest.mark.parametrize("spoilt", ["sft", "reward"])
def test_numbers_that_are_not_finite_end_the_stage(artifacts, tmp_path, stage, spoilt):
    with pytest.raises(NotFinite, match=f"{spoilt}/model: .* not finite"):
        run(stage, tmp_path, *artifacts(spoilt))
    assert not (tmp_path / "samples.jsonl").exists() and not list(tmp_path.glob("*.parquet"))
