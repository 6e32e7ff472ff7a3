"""`mpo select` and the runs after it, of rows that bring their scores: split without sampling or a reward model."""

import errno
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mpo_jax.config.schema import ToyConfig
from mpo_jax.data import toy
from mpo_jax.data.corpus import _load
from mpo_jax.data.pair_table import PairTable
from mpo_jax.pipeline.experiments import in_order
from mpo_jax.runtime.files import write_lines_together
from tests.pipeline.test_pipeline import mpo, stages

QUIET = (
    "runtime.compilation_cache=null", "runtime.token_cache=null", "runtime.fingerprint_cache=null",
    "runtime.tensorboard=false", "text.max_prompt_tokens=40", "text.max_response_tokens=16", "text.length_buckets=1",
)  # fmt: skip
RECIPE = ("sft.skip=true", "data.kind=scored", "select.pair_source=scored")
TRAINED = tuple(
    f"{stage}.train.{key}" for stage in ("dpo", "ppo") for key in ("steps=2", "batch_size=4", "log_every=1")
)


@pytest.fixture
def scored(tmp_path) -> Path:
    """The toy world's preferences with a worst response more, all scored."""
    world = toy.preferences(ToyConfig(num_pairs=32, num_attempts=1, num_fillers=0), test=False)
    rows = [
        {"prompt": row.prompt, "responses": [row.rejected, " no", row.chosen], "scores": [0.49, -1.0, number / 8]}
        for number, row in enumerate(world)
    ]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scored_rows_are_split_and_exported_without_a_reward_model(language_model, scored, tmp_path, capsys):
    workdir, out = tmp_path / "work", tmp_path / "out"
    flags = ("--model", language_model, "--data", scored, "--out", workdir, "--export", out)
    assert mpo("select", *flags, *RECIPE, *QUIET, "select.threshold=2.0", "data.validation_fraction=0.1") == 0
    assert sorted(name.rpartition("-")[0] for name in stages(workdir)) == ["select", "sft"]
    given = {row["prompt"]: row for row in lines(scored)}
    easy, hard = lines(out / "easy.jsonl"), lines(out / "hard.jsonl")
    assert easy and hard and len(easy) + len(hard) < len(given), "the held-out prompts are left out"
    for rows, is_easy in ((easy, True), (hard, False)):
        for row in rows:
            responses, scores = given[row["prompt"]]["responses"], given[row["prompt"]]["scores"]
            order = np.argsort(scores)
            assert row["chosen"] == responses[order[-1]] and row["rejected"] == responses[order[0]]
            assert np.allclose((row["score_chosen"], row["score_rejected"]), (max(scores), min(scores)))
            assert row["gap"] == np.float32(max(scores) - min(scores)) and (row["gap"] > 2.0) is is_easy
    assert lines(out / "hard_prompts.jsonl") == [{"prompt": row["prompt"]} for row in hard]
    said = " ".join(capsys.readouterr().out.split())
    assert f"hard_prompts.jsonl: {len(hard)} rows" in said


def test_scores_that_only_order_are_said_and_so_is_an_empty_side(language_model, scored, tmp_path, capsys):
    flags = (
        "--model",
        language_model,
        "--data",
        scored,
        "--out",
        tmp_path / "work",
        "data.kind=scored",
        "sft.skip=true",
    )
    said = "data.kind=scored: the scores only say which response is chosen"
    assert mpo("select", *flags, *QUIET, "select.easy_fraction=0.5", "reward.path=nowhere") == 2
    assert said in " ".join(capsys.readouterr().out.split())
    assert mpo("select", *flags, *QUIET, "select.pair_source=sampled", "reward.path=nowhere") == 2
    assert said not in " ".join(capsys.readouterr().out.split())
    out = tmp_path / "out"
    assert mpo("select", *flags, *QUIET, *RECIPE, "select.threshold=1000", "--export", out) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "easy.jsonl: 0 rows easy.jsonl is empty: no pair is on that side of the split (threshold 1000)" in shown
    assert said not in shown and "hard.jsonl is empty" not in shown
    # the file's own digits, not those of float32
    assert {row["score_chosen"] for row in lines(out / "hard.jsonl")} <= {
        x for row in lines(scored) for x in row["scores"]
    }


def test_no_file_of_an_export_takes_its_place_before_all_are_written(tmp_path):
    files = [tmp_path / name for name in ("easy.jsonl", "hard.jsonl")]
    write_lines_together({path: [{"of": "the first"}] for path in files})

    def torn():
        yield {"of": "the second"}
        assert lines(files[0]) == [{"of": "the first"}]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as failed:
        write_lines_together({files[0]: [{"of": "the second"}], files[1]: torn()})
    assert failed.value.filename == str(files[1])
    assert [lines(path) for path in files] == [[{"of": "the first"}]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["easy.jsonl", "hard.jsonl"]


def test_conversations_are_exported_as_turns(chat_model, tmp_path):
    """Also from a finished selection, whose table holds rendered text alone."""
    asked = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": f"my boss {n}"}] for n in range(8)]
    data, workdir, out = tmp_path / "scored.jsonl", tmp_path / "work", tmp_path / "out"
    rows = [{"prompt": turns, "responses": [" no", "quit"], "scores": [n, 2.5]} for n, turns in enumerate(asked)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", chat_model, "--data", data, "--out", workdir, *RECIPE, *QUIET, "data.validation_fraction=0")
    assert mpo("select", *flags, "select.threshold=1.0") == 0
    _load.cache_clear()
    assert mpo("select", *flags, "select.threshold=1.0", "--export", out) == 0
    easy, hard = lines(out / "easy.jsonl"), lines(out / "hard.jsonl")
    assert {json.dumps(row["prompt"]) for row in easy + hard} == {json.dumps(turns) for turns in asked}
    for row in easy + hard:
        sides = [{"role": "assistant", "content": text} for text in (" no", "quit")]
        better = row["score_chosen"] > 2.5
        assert [row["chosen"], row["rejected"]] == [[sides[0]], [sides[1]]][:: 1 if better else -1]
    assert lines(out / "hard_prompts.jsonl") == [{"prompt": row["prompt"]} for row in hard]


@pytest.mark.thorough
def test_a_whole_run_of_scored_rows(language_model, reward_model, scored, tmp_path):
    """The recipe of the README: DPO on easy pairs, PPO on hard prompts, evaluation and report."""
    workdir = tmp_path / "work"
    flags = ("--model", language_model, "--data", scored, "--out", workdir, f"reward.path={reward_model}")
    small = (*QUIET, *TRAINED, "select.easy_fraction=0.5", "select.threshold=null", "evaluate.batch_size=4")
    held_out = ("data.validation_fraction=0.2", "evaluate.bootstrap_resamples=100", "experiment=mpo,dpo_easy")
    assert mpo("run", *flags, *RECIPE, *small, *held_out) == 0
    run = workdir / "runs" / "mpo"
    assert json.loads((run / "select" / "manifest.json").read_text())["parents"].keys() == {"sft"}
    table = PairTable.read(run / "select")
    assert (table.chosen == 0).all() and np.array_equal(table.gap, table.score[:, 0] - table.score[:, 1])
    assert in_order(folder.name for folder in (workdir / "runs").iterdir()) == ["mpo", "dpo_easy"]
    page = (workdir / "report" / "index.html").read_text()
    assert "pairs of rows that brought their scores" in page
    assert mpo("report", workdir) == 0


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(scored, tmp_path, capsys, monkeypatch):
    assert mpo("select", "no.yaml", "--export", scored) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert mpo("select", "no.yaml", "--export", scored / "below") == 2
    assert "is not a folder" in capsys.readouterr().err

    def denied(**_):  # root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", denied)
    assert mpo("select", "no.yaml", "--export", tmp_path / "new") == 2
    assert "Permission denied; choose another place" in capsys.readouterr().err


def test_a_file_of_bad_scores_is_refused_with_its_line(language_model, scored, tmp_path, capsys):
    scored.write_text(json.dumps({"prompt": "my boss", "responses": [" no", " quit"], "scores": [1, "2"]}) + "\n")
    flags = ("--model", language_model, "--data", scored, "--out", tmp_path / "work")
    assert mpo("select", *flags, *RECIPE, *QUIET) == 2
    assert f"data.path: {scored}:1: score 2 must be a number, not '2'" in capsys.readouterr().err
