"""SimPO through the real command line: a loss that came by one line of the registry, without a reference model."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from mpo_jax.config.load import load_config
from mpo_jax.config.registry import Step
from mpo_jax.data import toy
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.models import forward
from mpo_jax.pipeline.stages import STAGES, stage_settings, stage_shapes
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.stages.context import Context
from mpo_jax.types import Tokens
from tests.models.tiny import answers, load_folder
from tests.pipeline.test_pipeline import MICRO, manifest, mpo, stages
from tests.reference import losses as ref

pytestmark = pytest.mark.thorough

SIMPO = ("dpo.loss=simpo", "dpo.beta=2.0", "dpo.loss_options.target_margin=0.5")
# the labelled pairs in the order of the file, so that the first batch is known
KNOWN = ("experiment=dpo_base", "dpo.train.shuffle=false", "dpo.nll_coef=0.1")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[tuple[str, str, bool]]]:
    """A finished run, and the models that were loaded: by which stage, from which, and whether frozen."""
    workdir, loaded, load = tmp_path_factory.mktemp("simpo"), [], Context.load

    def noted(self, path, *rest, frozen=False, **options):
        stage = self.folder.name.strip(".").partition("-")[0]
        loaded.append((stage, Path(path).parent.name.partition("-")[0], frozen))
        return load(self, path, *rest, frozen=frozen, **options)

    def refuse(*_):
        raise AssertionError("nobody asks for a reference's log-probabilities")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "load", noted)
        patch.setattr(forward, "make_response_logps", refuse)
        assert mpo("run", MICRO, f"workdir={workdir}", *SIMPO, *KNOWN) == 0
    return workdir, loaded


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "runs/dpo_base/1-dpo/metrics.jsonl").read_text().splitlines()]


def test_it_trains(made):
    workdir, _ = made
    assert len(rows(workdir)) == 3
    for row in rows(workdir):
        assert all(np.isfinite(value) for value in row.values() if not isinstance(value, str))
    assert rows(workdir)[1]["loss"] != rows(workdir)[0]["loss"]
    settings = manifest(workdir, "dpo_base", "1-dpo")["settings"]["loss"]
    assert settings == {
        "name": "simpo", "beta": 2.0, "length_normalised": False, "options": [["target_margin", 0.5]],
    }  # fmt: skip
    models = [(workdir / f"runs/dpo_base/{role}/model/model.safetensors").read_bytes() for role in ("sft", "1-dpo")]
    assert models[0] != models[1]
    assert manifest(workdir, "dpo_base", "evaluate")["summary"]["prompts"] == 16


def test_no_reference_is_loaded_or_planned(made):
    _, loaded = made
    assert [one for one in loaded if one[0] == "dpo"] == [("dpo", "sft", False)]
    planned = {}
    for loss in ("simpo", "dpo"):
        config = load_config(MICRO, (f"dpo.loss={loss}",))
        mesh = make_mesh(config.mesh)
        decoder, _ = load_folder(made[0] / "runs/dpo_base/sft/model")
        shapes = stage_shapes("dpo", config, decoder, mesh)
        settings = stage_settings("dpo", config, Step("dpo"))
        planned[loss] = {program.name: program for program in STAGES["dpo"].programs(settings, shapes)}
    assert list(planned["simpo"]) == ["dpo step"] and list(planned["dpo"]) == ["dpo reference", "dpo step"]
    assert planned["simpo"]["dpo step"].arguments({})[1].ref_logp is None
    assert planned["dpo"]["dpo step"].arguments({})[1].ref_logp.shape == (8, 2)


def test_the_first_loss_is_numpy_s(made):
    """From the SFT model's per-token log-probabilities, by a float64 log-softmax over all logits, a row at a time."""
    workdir, _ = made
    config = load_config(MICRO, (*SIMPO, *KNOWN))
    codec = TextCodec(toy.make_tokenizer(), config.text)
    decoder, params = load_folder(workdir / "runs/dpo_base/sft/model")
    logp, length, width = np.zeros((8, 2)), np.zeros((8, 2), int), 64
    for b, row in enumerate(load_corpus(config).human_pairs(None)[:8]):
        prompt = codec.prompt(row.prompt).ids
        for n, response in enumerate(codec.response(text).ids for text in (row.chosen, row.rejected)):
            ids = np.asarray([*prompt, *response])
            padded = np.zeros((1, width), np.int32)
            padded[0, : len(ids)] = ids
            ones = np.ones_like(padded)
            tokens = Tokens(padded, np.arange(width, dtype=np.int32)[None], ones, 0 * ones, ones > 0)
            logp_TV = log_softmax(np.asarray(answers(decoder, params, tokens)[0], np.float64), -1)
            per_token = logp_TV[np.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
            logp[b, n], length[b, n] = per_token.sum(), len(response)
    first = rows(workdir)[0]
    total, count = ref.simpo(logp, length, np.ones(8, bool), 2.0, 0.5)
    nll = ref.chosen_nll(logp[:, 0], length[:, 0], np.ones(8, bool))
    np.testing.assert_allclose(first["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(first["loss/nll"], 0.1 * nll[0] / nll[1], rtol=1e-5)
    rewards = 2.0 * logp / length
    np.testing.assert_allclose(first["rewards/chosen"], rewards[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(first["rewards/margins"], (rewards[:, 0] - rewards[:, 1]).mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first["logps/rejected"], logp[:, 1].mean(), rtol=1e-5)


@pytest.mark.parametrize("command", ["run", "sft", "dpo"])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dpo.loss=simpo", "dpo.loss_options.margin=0.5"], ["dpo.loss_options.margin", "target_margin"]),
        (["dpo.loss_options.target_margin=0.5"], ["dpo.loss_options.target_margin", "dpo.loss=dpo"]),
        (["dpo.loss=simpo", "dpo.loss_options.target_margin=big"], ["dpo.loss_options", "number"]),
        (["dpo.loss=simpoo"], ["dpo.loss", "simpo"]),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(command, overrides, words, tmp_path, capsys):
    assert mpo(command, MICRO, f"workdir={tmp_path}", *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    assert all(word in error for word in words), error
    assert not stages(tmp_path) and not list(tmp_path.glob("stages/.*.partial"))
