"""Real files through every stage: HH-RLHF and TL;DR rows and a pretrained Llama, cut down to seconds."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mpo_jax.data.pair_table import PairTable
from tests.pipeline.test_pipeline import manifest, mpo

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "hh_stories260k.yaml"
SHORT = (
    "data.max_rows=80", "data.validation_fraction=0.2", "text.max_prompt_tokens=48", "text.max_response_tokens=16",
    "sft.train.steps=2", "reward.train.steps=2", "select.num_prompts=32", "select.batch_size=16", "dpo.train.steps=2",
    "ppo.train.steps=2", "ppo.train.batch_size=8", "evaluate.num_prompts=16", "evaluate.batch_size=16",
    "experiment=mpo", "runtime.compilation_cache=null",
)  # fmt: skip


def test_hh_rows_and_a_real_llama_go_through_every_stage(shared_data, tmp_path):
    files = [shared_data / "hh-rlhf" / f"{name}.test.jsonl.gz" for name in ("helpful-base", "harmless-base")]
    paths = (f"model.path={shared_data / 'models' / 'stories260K'}", f"data.path=[{','.join(map(str, files))}]")
    assert mpo("run", CONFIG, f"workdir={tmp_path}", *paths, *SHORT) == 0
    summary = manifest(tmp_path, "mpo", "sft")["summary"]
    assert [source["read"] for source in summary["data"]] == [80, 80]
    assert all(s["kept"] + sum(s["dropped"].values()) == s["read"] for s in summary["data"])
    assert summary["tokens"]["truncated_prompts"] > 0 and summary["tokens"]["truncated_responses"] > 0
    # the pretrained model knows English: far below log 512, the loss of a uniform guess
    assert summary["held_out_nll"] < 0.75 * np.log(512)
    table = PairTable.read(tmp_path / "runs" / "mpo" / "select")
    assert len(table) == 32 and np.isnan(table.utility).all() and np.ptp(table.score) > 0
    evaluation = manifest(tmp_path, "mpo", "evaluate")["summary"]
    assert "utility" not in evaluation and 0 <= evaluation["has_eos"] <= 1
    samples = (tmp_path / "runs/mpo/evaluate/samples.jsonl").read_text().splitlines()
    assert len(samples) == 16 and all("\n\nAssistant:" in json.loads(line)["prompt"] for line in samples)
    assert {json.loads(line)["category"] for line in samples} == {"helpful", "harmless"}
    gaps = pq.read_table(tmp_path / "runs" / "mpo" / "reward" / "held_out.parquet")
    assert set(gaps["category"].to_pylist()) == {"helpful", "harmless"}


def test_own_preference_rows_need_only_a_model(shared_data, tmp_path):
    """`data.kind=pairs`: strings as they are, a validation split by prompt, and SFT on the chosen side."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"Once there was {n}", "chosen": f" dog {n}.", "rejected": " cat."}) + "\n"
            for n in range(120)
        )
    )
    model = f"model.path={shared_data / 'models' / 'stories260K'}"
    keys = ("data.kind=pairs", f"data.path={rows}", "sft.train.steps=1")
    assert mpo("sft", CONFIG, f"workdir={tmp_path / 'w'}", model, *keys, *SHORT[1:4], SHORT[-1]) == 0
    (made,) = (tmp_path / "w" / "stages").glob("sft-*")
    summary = json.loads((made / "manifest.json").read_text())["summary"]
    assert summary["data"][0]["kept"] == 120 and 80 < summary["tokens"]["rows"] < 115


def test_tldr_posts_go_through_every_stage(shared_data, tmp_path):
    """References to imitate, preferred sides to learn from, and every post but the tested ones to sample on."""
    path = shared_data / "tldr" / "tldr_1945.sft_and_pairs.jsonl.gz"
    model = f"model.path={shared_data / 'models' / 'stories260K'}"
    keys = (f"data.path={path}", f"data.prompt_path={path}", "reward.train.batch_size=8", "sft.train.batch_size=8")
    config = ROOT / "configs" / "tldr_smollm2.yaml"
    sizes = ("select.threshold=null", "select.easy_fraction=0.5", "dpo.train.batch_size=8", "text.length_buckets=2")
    assert mpo("run", config, f"workdir={tmp_path}", model, *keys, *sizes, *SHORT) == 0
    summary = manifest(tmp_path, "mpo", "sft")["summary"]
    pairs, references, prompts = summary["data"]
    assert pairs["read"] == references["read"] == prompts["read"] == 80 and pairs["kept"] < 81
    assert references["dropped"]["also a test prompt"] == 80 - prompts["kept"]
    assert prompts["dropped"] == {"also a test prompt": 80 - prompts["kept"]}
    # posts are longer than 48 tokens, and what is cut is the post: every prompt still ends with its question
    assert summary["tokens"]["truncated_prompts"] == summary["tokens"]["rows"] and summary["tokens"]["prompt_tokens"]
    samples = (tmp_path / "runs/mpo/evaluate/samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prompt"].endswith("TL;DR:") for line in samples)
    assert all(json.loads(line)["category"] in json.loads(line)["prompt"].splitlines()[0] for line in samples)


def test_an_instruct_model_knows_the_capital_of_france(smollm2, capsys):
    """Weights, rotary order, tokenizer and chat template of a real GGUF file: any one of them wrong gives nonsense."""
    assert mpo("generate", smollm2, "What is the capital of France?", "--max-new-tokens", "16") == 0
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."


def test_an_instruct_model_s_nll_of_human_dialogues(smollm2, shared_data, tmp_path):
    """Near 2.5 nats a token on chosen responses; a uniform guess has 10.8, a model with scrambled heads about 8."""
    data, out = shared_data / "hh-rlhf" / "helpful-base.test.jsonl.gz", tmp_path / "scores.jsonl"
    limits = ("text.max_prompt_tokens=96", "text.max_response_tokens=48", "text.length_buckets=1")
    assert mpo("score", smollm2, data, "--out", out, "--max-rows", "8", *limits) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    nll = np.mean([-row["logp_chosen"] / row["tokens_chosen"] for row in rows])
    assert len(rows) == 8 and 2.0 < nll < 3.2
