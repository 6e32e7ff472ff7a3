"""The examples run as written, and their results match the stages' own functions."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import mpo_jax as mpo
from mpo_jax.config.schema import TextConfig, ToyConfig
from mpo_jax.data import toy
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.types import merge, trainable

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A tiny policy, a reward model on the same trunk, and 60 pairs of the toy world."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer = toy.make_tokenizer()
    ids = TextCodec(tokenizer, TextConfig()).vocab_size
    decoder = DecoderConfig(
        vocab_size=-(-ids // 8) * 8, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, max_positions=256, tie_embeddings=True,
    )  # fmt: skip
    tree = forward.init_params(decoder, jax.random.key(0))
    loading.save(folder / "policy", Model(decoder), trainable(tree), tokenizer)
    judge = forward.with_score_head(tree, decoder)
    judge["score"]["kernel"] = jax.random.normal(jax.random.key(1), judge["score"]["kernel"].shape)
    loading.save(folder / "reward", Model(decoder), trainable(judge), tokenizer)
    rows = toy.preferences(ToyConfig(num_pairs=60), test=False)[:60]
    lines = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {name: str(folder / name) for name in ("policy", "reward", "pairs.jsonl")}


def lines_of(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def run(name: str, *arguments: str, capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(HERE / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.thorough
def test_dpo(files, tmp_path, capsys, monkeypatch):
    """The first loss is log 2, since policy and reference are equal; the saved model differs from the initial one."""
    out = run("dpo.py", files["policy"], files["pairs.jsonl"], str(tmp_path / "out"), capsys=capsys,
              monkeypatch=monkeypatch)  # fmt: skip
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 60 // 8 and losses[0] == pytest.approx(np.log(2), abs=1e-4)
    before, after = mpo.load(files["policy"]), mpo.load(tmp_path / "out")
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)]
    assert max(moved) > 1e-6


def test_the_example_of_dpo_has_fifteen_lines():
    assert len((HERE / "dpo.py").read_text(encoding="utf-8").rstrip().splitlines()) <= 18  # including blank lines


def test_select(files, tmp_path, capsys, monkeypatch):
    """The two files together hold every pair once; gaps are the reward model's own, and the threshold is strict."""
    run("select_pairs.py", files["reward"], files["pairs.jsonl"], str(tmp_path), capsys=capsys,
        monkeypatch=monkeypatch)  # fmt: skip
    parts = {name: lines_of(tmp_path / f"{name}.jsonl")
             for name in ("easy", "hard")}  # fmt: skip
    given = lines_of(files["pairs.jsonl"])
    split = [{k: v for k, v in row.items() if k != "gap"} for row in (*parts["easy"], *parts["hard"])]
    assert sorted(map(str, split)) == sorted(map(str, given))
    assert all(row["gap"] > 1.0 for row in parts["easy"]) and all(row["gap"] <= 1.0 for row in parts["hard"])
    reward = mpo.load_reward(files["reward"])
    pairs = mpo.read_pairs(parts["easy"] + parts["hard"], reward.tokenizer)
    score = mpo.score(reward, pairs)
    gaps = [row["gap"] for row in (*parts["easy"], *parts["hard"])]
    np.testing.assert_allclose(score[:, 0] - score[:, 1], gaps, rtol=1e-4, atol=1e-4)


def test_relabelled_pairs_have_the_higher_score_first(files):
    reward = mpo.load_reward(files["reward"])
    pairs = mpo.read_pairs(files["pairs.jsonl"], reward.tokenizer)
    easy, hard = mpo.select(pairs, reward, easy_fraction=0.5, relabel=True)
    assert len(easy) == 30 and len(hard) == 30 and min(easy.gap) > max(hard.gap) >= 0
    score = mpo.score(reward, easy)
    assert (score[:, 0] > score[:, 1]).all()


@pytest.mark.thorough
def test_own_objective(files, tmp_path, capsys, monkeypatch):
    """Hand-written SimPO equals the registered loss, is logged and saved, and resumes when run again."""
    arguments = files["policy"], files["pairs.jsonl"], str(tmp_path)
    first = run("own_objective.py", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines][:3] == [1, 2, 4] and lines[-1]["step"] == 15
    policy = mpo.load(files["policy"])
    batches = mpo.read_pairs(files["pairs.jsonl"], policy.tokenizer).batches(8, seed=0, epochs=2)
    ours = mpo.Dpo(policy, loss="simpo", beta=2.0, optimizer=optax.sgd(0.0))
    assert lines[0]["loss"] == pytest.approx(ours.step(batches[0])["loss"], rel=1e-5)
    assert "simpo" in first
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    again = run("own_objective.py", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert "'steps': 15" in again
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.thorough
def test_ppo_by_hand(files, tmp_path, capsys, monkeypatch):
    """The first KL is exactly 0, since policy and reference are the same; the last one is not."""
    out = run("ppo_by_hand.py", files["policy"], files["reward"], files["pairs.jsonl"], str(tmp_path / "out"),
              capsys=capsys, monkeypatch=monkeypatch)  # fmt: skip
    kls = [float(x) for x in re.findall(r"KL (-?[\d.]+)", out)]
    assert len(kls) == 60 // 8 and kls[0] == 0.0 and kls[-1] != 0.0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.thorough
def test_eight_devices(files, capsys, monkeypatch):
    out = run("eight_devices.py", files["policy"], files["pairs.jsonl"], capsys=capsys, monkeypatch=monkeypatch)
    assert "8 devices" in out and float(out.rsplit(" ", 1)[-1]) < 1e-4


@pytest.mark.thorough
def test_sft_and_a_reward_model_learn(files):
    """Loss and accuracy on the training rows."""
    policy = mpo.load(files["policy"])
    rows = lines_of(files["pairs.jsonl"])
    shown = mpo.read_demonstrations([{"prompt": r["prompt"], "response": r["chosen"]} for r in rows], policy.tokenizer)
    sft = mpo.Sft(policy, optimizer=optax.adam(1e-2))
    losses = [sft.step(batch)["loss"] for batch in shown.batches(8, epochs=4)]
    assert losses[-1] < 0.6 * losses[0]
    reward = mpo.Reward(sft.policy, optimizer=optax.adam(3e-3), accumulation=2)
    pairs = mpo.read_pairs(rows, policy.tokenizer)
    measures = [reward.step(batch) for batch in pairs.batches(16, epochs=12)]
    assert measures[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert np.mean([m["accuracy"] for m in measures[-4:]]) > 0.8


def test_select_takes_one_kind_of_border(files):
    reward = mpo.load_reward(files["reward"])
    pairs = mpo.read_pairs(files["pairs.jsonl"], reward.tokenizer)
    with pytest.raises(UserError, match="give one of them"):
        mpo.select(pairs, reward, threshold=1.0, easy_fraction=0.5)
    with pytest.raises(UserError, match="must lie in"):
        mpo.select(pairs, reward, easy_fraction=1.5)


def test_a_reward_model_keeps_its_head_when_it_trains_on(files):
    reward = mpo.load_reward(files["reward"], frozen=False)
    pairs = mpo.read_pairs(files["pairs.jsonl"], reward.tokenizer).take(np.arange(60) < 8)
    assert len(pairs) == 8
    np.testing.assert_array_equal(
        mpo.score(mpo.Reward(reward, optimizer=optax.sgd(0.0)).policy, pairs), mpo.score(reward, pairs)
    )


@pytest.mark.thorough
def test_rows_are_sampled_as_they_were_read(files):
    """With the template under which they were tokenized."""
    policy = mpo.load(files["policy"], max_response_tokens=8)
    texts = mpo.read_prompts(files["pairs.jsonl"], policy.tokenizer).prompts[:8]
    rows = [{"prompt": text} for text in texts]
    templated = mpo.read_prompts(rows, policy.tokenizer, prompt_template="my {prompt}")
    wanted = mpo.sample(policy, [f"my {text}" for text in texts], batch_size=8)
    assert mpo.sample(policy, templated, batch_size=8) == wanted != mpo.sample(policy, texts, batch_size=8)


def test_what_is_printed_fits_a_line(files):
    policy = mpo.load(files["policy"])
    pairs = mpo.read_pairs(files["pairs.jsonl"], policy.tokenizer)
    assert "language model" in repr(policy) and "60 pairs" in repr(pairs)
    assert max(len(repr(policy)), len(repr(pairs))) < 160


@pytest.mark.thorough
def test_samples_depend_on_prompt_seed_and_number_alone(files):
    policy = mpo.load(files["policy"], max_response_tokens=8)
    prompts = mpo.read_prompts(files["pairs.jsonl"], policy.tokenizer).prompts[:16]
    all_at_once = mpo.sample(policy, prompts, num_samples=2, batch_size=16)
    alone = mpo.sample(policy, prompts[5:6], num_samples=2, batch_size=8)
    assert alone == all_at_once[5:6] and all_at_once != mpo.sample(policy, prompts, num_samples=2, seed=1)


@pytest.mark.thorough
def test_scores_of_a_language_model_are_log_probabilities(files):
    policy = mpo.load(files["policy"])
    pairs = mpo.read_pairs(files["pairs.jsonl"], policy.tokenizer).take(range(8))
    batch = next(iter(pairs.batches(8, shuffle=False)))
    wanted = forward.response_logps(policy.model, merge(policy.params), jax.tree.map(np.asarray, batch.rows))
    np.testing.assert_allclose(mpo.score(policy, pairs), wanted, rtol=1e-4)


def first_pairs(policy, files):
    return mpo.read_pairs(files["pairs.jsonl"], policy.tokenizer).batches(8)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, f: mpo.read_pairs([{"prompt": "a"}], p.tokenizer), "row 1.*no field 'chosen'"),
        (lambda p, f: mpo.read_pairs([], p.tokenizer), "no rows"),
        (lambda p, f: mpo.read_pairs(f["pairs.jsonl"], p.tokenizer, max_row=3), "did you mean max_rows"),
        (lambda p, f: mpo.read_pairs(f["pairs.jsonl"], p.tokenizer, kind="hhh"), "did you mean hh"),
        (lambda p, f: mpo.load_reward(f["policy"]), "a language model, not a reward model"),
        (lambda p, f: mpo.save(p, Path(f["policy"])), "not empty"),
        (lambda p, f: mpo.select(mpo.read_pairs(f["pairs.jsonl"], p.tokenizer), p), "reward must be a reward model"),
        (lambda p, f: mpo.Ppo(p, p, optimizer=optax.sgd(1.0)), "reward must be a reward model"),
        (lambda p, f: mpo.Dpo(mpo.load_reward(f["reward"]), optimizer=optax.sgd(1.0)), "must be a language model"),
        (lambda p, f: mpo.Dpo(p, optimizer=optax.sgd(1.0), loss="simp"), "did you mean simpo"),
        (lambda p, f: mpo.Dpo(p, optimizer=optax.sgd(1.0), beta=-1.0), "beta: .*greater than 0"),
        (lambda p, f: mpo.Dpo(p, optimizer=optax.sgd(1.0), loss_options={"a": 1.0}), "no such option: it has none"),
        (lambda p, f: mpo.Ppo(p, mpo.load_reward(f["reward"]), optimizer=optax.sgd(1.0), one_pass=True), "no option"),
        (lambda p, f: mpo.Reward(mpo.load_reward(f["reward"]), optimizer=optax.sgd(1.0)), "is frozen"),
        (lambda p, f: mpo.Dpo(p, optimizer=optax.sgd(1.0), loss="cdpo", loss_options={"label_smoothing": 0.9}), "0.5"),
        (lambda p, f: mpo.score(p, mpo.read_prompts(f["pairs.jsonl"], p.tokenizer)), "no responses"),
        (lambda p, f: mpo.sample(p, ["a"], max_new_tokens=1000), "positions"),
        (lambda p, f: mpo.Sft(p, optimizer=optax.sgd(1.0)).step(first_pairs(p, f)), "must be demonstrations"),
        (lambda p, f: mpo.Sft(mpo.load(f["policy"], frozen=True), optimizer=optax.sgd(1.0)), "is frozen"),
        (lambda p, f: mpo.sample(p, "one prompt"), "a list of texts"),
        (lambda p, f: next(iter(mpo.read_pairs(f["pairs.jsonl"], p.tokenizer).batches(6))), None),
    ],
)  # fmt: skip
def test_mistakes(files, call, message):
    policy = mpo.load(files["policy"])
    if message is None:
        with pytest.raises(UserError, match="does not divide"):
            mpo.Dpo(policy, optimizer=optax.sgd(0.1)).step(call(policy, files))
        return
    with pytest.raises(UserError, match=message):
        call(policy, files)


def test_the_import_is_light():
    """It takes under a second and loads neither JAX nor transformers nor Orbax; every exported name exists."""
    code = (
        "import sys, time; begin = time.perf_counter(); import mpo_jax; print(time.perf_counter() - begin); "
        "print(sorted(name for name in ('jax', 'flax', 'transformers', 'orbax', 'pydantic') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = done.stdout.splitlines()
    assert loaded == "[]" and float(seconds) < 1
    for name in mpo.__all__:
        assert getattr(mpo, name) is not None
