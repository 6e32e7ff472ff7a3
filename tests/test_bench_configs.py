"""configs/bench: stages that another program times. Their losses against NumPy, and the lines that it reads."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import OptimConfig, ToyConfig
from mpo_jax.data import toy
from mpo_jax.types import Tokens
from tests.cli.conftest import write_model
from tests.models.tiny import DECODER, answers, load_folder
from tests.pipeline.test_pipeline import mpo

pytestmark = pytest.mark.thorough

BENCH = Path(__file__).parents[1] / "configs" / "bench"
STAGES = ("sft", "reward", "dpo", "ppo")
ROWS, BATCH, STEPS = 5, 2, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model, a file of pairs, and a workdir in which the stages share what comes before them."""
    folder = tmp_path_factory.mktemp("bench")
    vocab = -(-len(toy.make_tokenizer()) // 8) * 8
    decoder = dataclasses.replace(DECODER, vocab_size=vocab, num_layers=1)
    pairs = toy.preferences(ToyConfig(num_pairs=ROWS, num_attempts=1, num_fillers=0), test=False)
    rows = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SimpleNamespace(model=write_model(folder / "model", decoder), rows=rows, folder=folder)


def bench(inputs, command: str, name: str, *overrides: str) -> int:
    """The status of `mpo COMMAND configs/bench/NAME.yaml` on the inputs."""
    return mpo(
        command, BENCH / f"{name}.yaml", f"model.path={inputs.model}", f"data.path={inputs.folder / 'rows.jsonl'}",
        f"workdir={inputs.folder / 'work'}", "text.max_prompt_tokens=44", "text.max_response_tokens=20",
        "runtime.compilation_cache=null", "runtime.token_cache=null", *overrides,
    )  # fmt: skip


def run(inputs, capsys, stage: str, *overrides: str) -> list[dict[str, float]]:
    """The values of the lines that `mpo STAGE` prints, a dictionary a step."""
    assert bench(inputs, stage, stage, f"train.steps={STEPS}", f"train.batch_size={BATCH}", *overrides) == 0
    lines = [line.split(" ") for line in capsys.readouterr().out.splitlines() if line.startswith(f"{stage} step ")]
    steps = [dict(zip(words[1::2], map(float, words[2::2]), strict=True)) for words in lines]
    assert [values["step"] for values in steps] == list(range(1, STEPS + 1))
    assert "compile_s" in steps[0] and "step_time_s" not in steps[0]
    for values in steps[1:]:
        assert 0 < values["step_time_s"] < 60 and values["tokens_per_s"] > 0
    return steps


def response_logps(inputs, side: str) -> list[np.ndarray]:
    """The log-probability of each response token, EOS last, by a log-softmax over all logits; a row at a time."""
    tokenizer = toy.make_tokenizer()
    decoder, params = load_folder(inputs.model)
    found = []
    for row in inputs.rows:
        prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in (row["prompt"], row[side]))
        ids = np.asarray([*prompt, *response, tokenizer.eos_token_id])
        # one width, so that one program is compiled: later tokens are not seen by earlier ones
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        ones = np.ones_like(padded)
        tokens = Tokens(padded, np.arange(64, dtype=np.int32)[None], ones, 0 * ones, ones > 0)
        logp_TV = log_softmax(np.asarray(answers(decoder, params, tokens)[0], np.float64), -1)
        found.append(logp_TV[np.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]])
    return found


def batch_rows(step: int) -> np.ndarray:
    """The numbers of a step's rows, from step 1: in file order, around the end to the first."""
    return np.arange((step - 1) * BATCH, step * BATCH) % ROWS


def test_sft_is_the_nll_of_the_file_s_rows_in_order(inputs, capsys):
    """At rate 0 every step shows the base model."""
    logps = response_logps(inputs, "chosen")
    for values in run(inputs, capsys, "sft", "train.optim.learning_rate=0"):
        rows = np.concatenate([logps[row] for row in batch_rows(int(values["step"]))])
        np.testing.assert_allclose(values["loss"], -rows.mean(), rtol=1e-5)


def test_the_reward_model_starts_at_log_2_and_learns(inputs, capsys):
    steps = run(inputs, capsys, "reward", "train.log_every=3", "--log-every", "1")
    np.testing.assert_allclose(steps[0]["loss"], np.log(2), rtol=1e-6)
    assert steps[1]["loss"] != steps[0]["loss"]


def test_dpo_starts_at_log_2_from_the_base_model(inputs, capsys):
    steps = run(inputs, capsys, "dpo")
    np.testing.assert_allclose(steps[0]["loss"], np.log(2), rtol=1e-6)
    assert steps[1]["loss"] != steps[0]["loss"]
    (stage,) = inputs.folder.glob("work/stages/dpo-*")
    first = json.loads((stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    for side in ("chosen", "rejected"):
        logps = response_logps(inputs, side)
        expected = np.mean([logps[row].sum() for row in batch_rows(1)])
        np.testing.assert_allclose(first[f"logps/{side}"], expected, rtol=1e-5)


def test_nothing_is_measured_where_nothing_is_held_out(inputs, capsys):
    """And evaluation is refused before anything is trained."""
    assert bench(inputs, "reward", "reward", "train.steps=1", "train.batch_size=1") == 0
    manifests = inputs.folder.glob("work/stages/*/manifest.json")
    made = [json.loads(path.read_text(encoding="utf-8")) for path in manifests]
    kept = {manifest["stage"]: manifest["summary"] for manifest in made if manifest["stage"] in ("sft", "reward")}
    assert kept["sft"]["held_out_nll"] is None
    assert kept["reward"]["held_out_accuracy"] is None and kept["reward"]["accuracy_by_gap"] is None
    assert bench(inputs, "evaluate", "sft", f"workdir={inputs.folder / 'evaluated'}") == 2
    assert "no held-out prompts to evaluate on: name preference rows as data.test_path" in capsys.readouterr().err
    assert not list((inputs.folder / "evaluated" / "stages").iterdir())


def test_ppo_starts_at_its_reference(inputs, capsys):
    apart = run(inputs, capsys, "ppo", "ppo.one_pass=false")[0]
    assert apart["kl"] == apart["score"] == apart["value_loss"] == 0
    np.testing.assert_allclose(apart["loss"], 0, atol=1e-7)
    # in one pass the actor's log-probabilities come from another program than the reference's
    joined = run(inputs, capsys, "ppo")[0]
    for name in ("kl", "score", "value_loss", "loss"):
        np.testing.assert_allclose(joined[name], 0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_they_are_what_other_trainers_do(stage):
    config = load_config(BENCH / f"{stage}.yaml", ("data.path=x.jsonl",))
    train = getattr(config, stage).train
    optims = [train.optim, *([config.ppo.critic_optim] if stage == "ppo" else [])]
    for optim in optims:
        assert optim == OptimConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0, beta2=0.999, clip_norm=1.0)
        assert (optim.weight_decay, optim.warmup_steps, optim.beta1, optim.eps) == (0, 0, 0.9, 1e-8)
    assert (train.shuffle, train.log_every, train.accumulation) == (False, 1, 1)
    assert train.checkpoint_every > 10**5 and config.text.length_buckets == 1 and not config.data.holds_out
    assert (config.model.compute_dtype, config.model.frozen_dtype) == ("float32", "float32")
    for before in STAGES[: STAGES.index(stage)][:2]:
        still = getattr(config, before).train
        assert (still.optim.learning_rate, still.steps, still.batch_size) == (0, 1, 1)
