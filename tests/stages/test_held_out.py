"""Measures on held-out rows in the real stages: equal to what is computed apart from them, and without a trace."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import EVAL, MEASURES, TRAINED, Config
from mpo_jax.data.batches import Buckets
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.records import Preference
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.models import forward, loading
from mpo_jax.models.generate import Sampling
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.stages.evaluate import make_kl
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.training.refill import sample_all, with_responses
from mpo_jax.types import Head, Params, merge
from tests.models.tiny import mesh_of
from tests.pipeline.test_pipeline import MICRO, mpo, stages

pytestmark = pytest.mark.thorough

MEASURED = (*(f"{stage}.train.eval_every=2" for stage in TRAINED), "dpo.nll_coef=0.1", "data.validation_fraction=0.3")
"""Twelve test prompts in batches of eight, and held-out rows in batches of eight and sixteen: filler among them."""
ROWS = ("ppo.train.eval_rows=12", "dpo.train.eval_rows=13")


def folder_of(workdir: Path, stage: str) -> Path:
    (folder,) = workdir.glob(f"stages/{stage}-*")
    return folder


def rows(workdir: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder_of(workdir, stage) / "metrics.jsonl").read_text().splitlines()]


def last(workdir: Path, stage: str) -> dict[str, float]:
    return {k.removeprefix(EVAL): v for k, v in rows(workdir, stage)[-1].items() if k.startswith(EVAL)}


def summary(workdir: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder_of(workdir, stage) / "manifest.json").read_text())["summary"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("measured")
    assert mpo("ppo", MICRO, f"workdir={workdir}", *MEASURED, *ROWS) == 0
    return workdir


def config_of(workdir: Path, stage: str) -> Config:
    return load_config(folder_of(workdir, stage) / "config.yaml")


def load(workdir: Path, stage: str, *, head: Head = "lm") -> tuple[Any, Params, TextCodec]:
    """A finished stage's model and codec, on one device."""
    config, folder = config_of(workdir, stage), folder_of(workdir, stage) / "model"
    model, params = loading.load(
        folder, loading.Options.of(config.model), mesh_of(1, 1, 1), text=config.text, head=head
    )
    return model, params, TextCodec(load_tokenizer(folder), config.text)


def examples_of(codec: TextCodec, pairs: Sequence[Preference]) -> list[Example]:
    return tokenize(codec, [(row.prompt, (row.chosen, row.rejected)) for row in pairs])[0]


def test_training_with_and_without_is_the_same_to_the_bit(measured, tmp_path):
    """Under the same names, with the same models, and with the same lines besides the measures."""
    assert mpo("ppo", MICRO, f"workdir={tmp_path}", "dpo.nll_coef=0.1", "data.validation_fraction=0.3") == 0
    assert set(stages(tmp_path)) == set(stages(measured))
    for stage in TRAINED:
        for model in ("model", "critic") if stage == "ppo" else ("model",):
            one, two = (folder_of(workdir, stage) / model / "model.safetensors" for workdir in (tmp_path, measured))
            assert one.read_bytes() == two.read_bytes()
        plain, with_measures = (
            [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf", EVAL))} for row in rows(at, stage)]
            for at in (tmp_path, measured)
        )
        assert plain == with_measures


@pytest.mark.parametrize("stage", TRAINED)
def test_each_stage_measures_what_its_configuration_may_name(measured, stage):
    logged = [row for row in rows(measured, stage) if any(name.startswith(EVAL) for name in row)]
    end = rows(measured, stage)[-1]["step"]
    assert [row["step"] for row in logged] == sorted({*range(2, end, 2), end})
    for row in logged:
        assert {name.removeprefix(EVAL) for name in row if name.startswith(EVAL)} == set(MEASURES[stage])
        assert {name.removeprefix(EVAL) for name in row if name.startswith(EVAL)} < set(row), "the same names"
        assert row["timing_s/eval"] > 0


def test_sft_s_loss_and_reward_s_accuracy_are_those_of_held_out_rows(measured):
    """SFT's of the test set; the reward model's of its validation rows, on which the other stages train."""
    np.testing.assert_allclose(last(measured, "sft")["loss"], summary(measured, "sft")["held_out_nll"], rtol=1e-6)
    model, params, codec = load(measured, "reward", head="value")
    score = forward.make_score_pairs(model, mesh_of(1, 1, 1))
    gap = []
    validation = load_corpus(config_of(measured, "sft")).validation
    for example in examples_of(codec, validation):
        score_N = np.asarray(score(params, one_row(example)), np.float64)[0]
        gap.append(score_N[0] - score_N[1])
    assert len(gap) > 5
    np.testing.assert_allclose(last(measured, "reward")["accuracy"], np.mean(np.asarray(gap) > 0), rtol=1e-6)
    np.testing.assert_allclose(last(measured, "reward")["loss"], np.log1p(np.exp(-np.asarray(gap))).mean(), rtol=1e-5)
    np.testing.assert_allclose(last(measured, "reward")["gap"], np.mean(gap), rtol=1e-4, atol=1e-6)


def one_row(example: Example) -> Any:
    from mpo_jax.data.batches import Widths, collate

    # one shape for all rows, so that there is one compilation
    return collate([example], Widths(40, 16), num_responses=len(example.responses))


def logp(model: Any, params: Any, example: Example) -> list[float]:
    """Both responses' log-probabilities, from the logits in float64 NumPy."""
    totals = []
    for response in example.responses:
        row = one_row(Example(example.prompt, [response]))
        logits = np.asarray(LOGITS(model, params, row), np.float64)[0]
        log_p = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        # the prompt has 40 columns, and the response begins after them
        places = [len(example.prompt) - 1, *range(40, 40 + len(response) - 1)]
        totals.append(sum(log_p[place, token] for place, token in zip(places, response, strict=True)))
    return totals


LOGITS = jax.jit(lambda model, params, row: forward.logits(model, merge(params), forward.join(row)), static_argnums=0)


def test_dpo_s_measures_are_those_of_the_held_out_human_pairs(measured):
    """Margins, accuracy, loss and log-probabilities from the models on disk."""
    model, policy, codec = load(measured, "dpo")
    _, reference, _ = load(measured, "sft")
    examples = examples_of(codec, load_corpus(config_of(measured, "dpo")).held_out[:13])
    policy_B2, ref_B2 = (np.asarray([logp(model, params, e) for e in examples]) for params in (policy, reference))
    rewards = 0.1 * (policy_B2 - ref_B2)
    margin = rewards[:, 0] - rewards[:, 1]
    lengths = np.asarray([len(example.responses[0]) for example in examples])
    expected = {
        "loss": np.log1p(np.exp(-margin)).mean(),
        "loss/nll": 0.1 * (-policy_B2[:, 0] / lengths).mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "logps/chosen": policy_B2[:, 0].mean(),
        "logps/rejected": policy_B2[:, 1].mean(),
    }
    found = last(measured, "dpo")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


def test_ppo_s_measures_are_those_of_its_policy_on_the_test_prompts(measured):
    """Sampled apart, by the sampler that refills and in other batches, and scored by the stages that evaluation has."""
    mesh, config = mesh_of(1, 1, 1), config_of(measured, "ppo")
    model, policy, codec = load(measured, "ppo")
    _, reference, _ = load(measured, "dpo")
    judge, reward_params, _ = load(measured, "reward", head="value")
    prompts = load_corpus(config).test_prompts[:12]
    examples, _ = tokenize(codec, [(prompt, ()) for prompt in prompts])
    allowed = jnp.asarray(codec.allowed(model.decoder.vocab_size))
    with jax.set_mesh(mesh):
        found = sample_all(
            model, policy, examples, sampling=Sampling(16), eos_id=codec.eos_id, allowed_V=allowed,
            key=stage_key(config.seed, "ppo/eval"), buckets=Buckets.of(examples, 1), batch_size=5, mesh=mesh,
        )  # fmt: skip
        answered = [one_row(example) for example in with_responses(examples, found)]
        scores = [float(forward.make_score_pairs(judge, mesh)(reward_params, row)[0, 0]) for row in answered]
        kls = [float(make_kl(model, 1.0, mesh)(policy, reference, row, allowed)[0]) for row in answered]
    measures = last(measured, "ppo")
    np.testing.assert_allclose(measures["objective/scores"], np.mean(scores), rtol=1e-4)
    np.testing.assert_allclose(measures["objective/kl"], np.mean(kls), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        measures["objective/rlhf_reward"], np.mean(scores) - config.ppo.kl.coef * np.mean(kls), rtol=1e-4
    )
    assert measures["response_length/mean"] == found.length.mean()
    np.testing.assert_allclose(measures["response_length/clip_ratio"], 1 - found.has_eos.mean(), rtol=1e-6)


def test_a_stage_that_gets_worse_exports_its_best_state(tmp_path, capsys):
    """A learning rate that is far too high: the held-out loss rises, and the model is the one from before."""
    options = (
        "sft.train.optim.learning_rate=0.2", "sft.train.optim.schedule=constant", "sft.train.steps=3",
        "sft.train.best_metric=eval/loss", "sft.train.eval_every=1",
    )  # fmt: skip
    assert mpo("sft", MICRO, f"workdir={tmp_path}", *options) == 0
    losses = {row["step"]: row["eval/loss"] for row in rows(tmp_path, "sft")}
    best = min(losses, key=losses.__getitem__)
    assert best < 3 and losses[3] > losses[best] + 0.1
    made = summary(tmp_path, "sft")
    assert made["best"] == {"step": best, "metric": "eval/loss", "value": losses[best]}
    np.testing.assert_allclose(made["held_out_nll"], losses[best], rtol=1e-6)
    assert f"of step {best} of 3: that state is exported" in " ".join(capsys.readouterr().out.split())


def test_ppo_exports_actor_critic_and_average_of_its_best_state_and_verifies(measured, tmp_path, capsys):
    """KL only grows, so the least is the first step's: what is exported is what that checkpoint holds."""
    workdir = Path(shutil.copytree(measured, tmp_path / "copy"))
    shutil.rmtree(folder_of(workdir, "ppo"))
    options = (
        "ppo.train.best_metric=eval/objective/kl_k3", "ppo.train.eval_every=1", "ppo.extras.ema_decay=0.5",
        "ppo.train.optim.learning_rate=0.05", "runtime.keep_finished_checkpoints=true", "runtime.offload_moments=true",
        "ppo.train.keep_checkpoints=1",
    )  # fmt: skip
    assert mpo("ppo", MICRO, f"workdir={workdir}", *MEASURED, *ROWS, *options) == 0
    kl = [row["eval/objective/kl_k3"] for row in rows(workdir, "ppo")]
    assert summary(workdir, "ppo")["best"]["step"] == 1 and kl[0] == min(kl) < min(kl[1:])
    folder = folder_of(workdir, "ppo")
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    assert checkpoints.steps() == [1, 2]
    stored = checkpoints._manager.restore(1, args=None)["state"]
    checkpoints.close()
    for name, params in (("model", stored["ema"]), ("critic", stored["critic"]["trainable"])):
        options = loading.Options.of(config_of(workdir, "ppo").model)
        head: Head = "value" if name == "critic" else "lm"
        written = merge(loading.load(folder / name, options, mesh_of(1, 1, 1), head=head)[1])
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(written), jax.tree.leaves(params), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), (name, jax.tree_util.keystr(path))
    capsys.readouterr()
    assert mpo("verify", workdir, "--stage", "ppo") == 0
    assert "steps 1 to 2 identical" in " ".join(capsys.readouterr().out.split())
