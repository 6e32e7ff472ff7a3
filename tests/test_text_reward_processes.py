"""Real processes whose rewards read text: two of them together, and one that is killed in the middle of PPO."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from mpo_jax.data.pair_table import PairTable
from tests.commands import Commands
from tests.pipeline.test_pipeline import MICRO, mpo
from tests.pipeline.test_text_rewards import formula, inputs, settings, written  # noqa: F401 (fixtures)
from tests.test_kills import assert_same, folder_of, lines, log
from tests.test_multi_process import CACHE, MESH, Pair

pytestmark = pytest.mark.processes


# ruff: noqa: F811
def command(inputs: Path, workdir: Path, *more: str) -> tuple[str, ...]:
    return ("run", *settings(inputs, workdir, *MESH, *more))


def finish(pair: Pair) -> None:
    assert pair.wait() == [0, 0], pair.text(0)[-3000:] + pair.text(1)[-3000:]


def samples(workdir: Path) -> list[dict]:
    text = (workdir / "runs" / "ppo_hard" / "evaluate" / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_two_processes_score_with_a_reward_model_of_other_tokens_as_one(inputs, tmp_path):
    given = f"reward.path={inputs}/other"
    pair = Pair(tmp_path, *command(inputs, tmp_path / "two", given))
    finish(pair)
    assert mpo(*command(inputs, tmp_path / "one", given), "runtime.cpu_devices=8", CACHE) == 0
    two, one = (PairTable.read(folder_of(tmp_path / name, "select")) for name in ("two", "one"))
    assert list(two.response) == list(one.response)
    np.testing.assert_allclose(two.score, one.score, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(log(folder_of(tmp_path / name, "ppo")) for name in ("two", "one")), strict=True):
        assert a["objective/scores"] == pytest.approx(b["objective/scores"], rel=1e-3, abs=1e-4)
    for a, b in zip(samples(tmp_path / "two"), samples(tmp_path / "one"), strict=True):
        assert a["response"] == b["response"] and a["score"] == pytest.approx(b["score"], rel=1e-3, abs=1e-4)


def test_the_first_of_two_processes_calls_the_function(inputs, written, tmp_path):
    """Every score is the formula's, PPO's too: the batch is spread over both processes, in order."""
    workdir, given = tmp_path / "w", f"reward.function={written}"
    finish(Pair(tmp_path, *command(inputs, workdir, given)))
    table = PairTable.read(folder_of(workdir, "select"))
    rows = zip(table.prompt, table.response, strict=True)
    expected = [[formula(prompt, text) for text in pair] for prompt, pair in rows]
    np.testing.assert_allclose(table.score, expected, rtol=1e-6)
    for sample in samples(workdir):
        assert sample["score"] == pytest.approx(formula(sample["prompt"], sample["response"]))
    alone = tmp_path / "alone"
    assert mpo(*command(inputs, alone, given), "runtime.cpu_devices=8", CACHE) == 0
    two, one = ([line["objective/scores"] for line in log(folder_of(w, "ppo"))] for w in (workdir, alone))
    assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_a_function_that_fails_ends_both(inputs, written, tmp_path):
    """The first process says at which row; the other, which does not call it, ends too."""
    module = Path(f"{written.partition(':')[0]}.py")
    module.write_text(module.read_text().replace("fail_at = None", "fail_at = 3"))
    pair = Pair(tmp_path, *command(inputs, tmp_path / "w", f"reward.function={written}"), timeout=5)
    first, second = pair.wait(200)
    assert first == 2 and second != 0
    assert f"reward.function={written} fails at the prompt" in pair.text(0)
    assert "RuntimeError: out of service" in pair.text(0) and "Traceback" not in pair.text(0) + pair.text(1)


@pytest.mark.parametrize("kind", ["model", "function"])
def test_killed_in_ppo_it_goes_on_and_ends_equal(inputs, written, tmp_path, kind):
    """kill -9 and SIGTERM, one after the other."""
    given = f"reward.path={inputs}/other" if kind == "model" else f"reward.function={written}"
    longer = (given, CACHE, "ppo.train.steps=12", "ppo.train.checkpoint_every=1", "runtime.tensorboard=false")
    commands = Commands(tmp_path, MICRO, ())
    try:
        whole, killed = (settings(inputs, tmp_path / name, *longer)[1:] for name in ("whole", "killed"))
        commands.run("ppo", *whole)
        for sent, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
            commands.start("ppo", *killed)
            before = lines(tmp_path / "killed", "ppo")
            while not commands.ended() and lines(tmp_path / "killed", "ppo") < max(before, 0) + 2:
                time.sleep(0.001)
            commands.signal(sent)
            assert commands.status() == status, commands.said()
        commands.run("ppo", *killed)
    finally:
        commands.close()
    assert_same(folder_of(tmp_path / "whole", "ppo"), folder_of(tmp_path / "killed", "ppo"))
