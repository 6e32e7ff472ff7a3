"""Rewards from text: a reward model with a tokenizer of its own, and a Python function, through the real commands.

The policy's words begin with a space each, so that any sequence of its tokens is read back as the same tokens: a reward
model that knows the same words under other numbers must give what one of the policy's tokens gives.
"""

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo_jax.config.load import load_config
from mpo_jax.data.pair_table import PairTable
from mpo_jax.errors import PassPreempted
from mpo_jax.evaluation import reward_function
from mpo_jax.evaluation.calibration import read_gaps
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import weights
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.passes import Pass
from mpo_jax.stages.context import Context
from mpo_jax.types import Tokens, trainable
from tests.models.tiny import mesh_of, random_params
from tests.pipeline.test_pipeline import MICRO, manifest, manifest_folder, mpo
from tests.reward_models import with_other_ids

pytestmark = pytest.mark.thorough

WORDS = tuple(f" w{i}" for i in range(30))
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['content'] %}{{ ' ' + m['content'] | trim }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Contents begin with a space, as all words do."""
SCORES = """
    calls = []
    fail_at = None

    def brevity(prompts, responses):
        calls.append(len(responses))
        if len(calls) == fail_at:
            raise RuntimeError("out of service")
        return [response.count("w1") - 0.25 * len(response.split()) + len(prompt) / 64
                for prompt, response in zip(prompts, responses, strict=True)]
"""


def formula(prompt: str, response: str) -> float:
    return len(re.findall("w1", response)) - len(response.split()) / 4 + len(prompt) / 64


def word_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    roles = ["<user>", "<assistant>"] if chat else []
    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "</s>", *roles, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" \w+"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=roles, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if chat:
        made.chat_template = CHAT
    return made


def make_inputs(folder: Path, *, chat: bool = False) -> Path:
    """`policy`, `reward` with its tokens, `other` with the same words under other numbers, and rows of pairs."""
    tokenizer, config = word_tokenizer(chat=chat), load_config(MICRO)
    decoder = loading.scratch_sizes(config.model.architecture, len(tokenizer))
    for name, head in (("policy", "lm"), ("reward", "value")):
        params = random_params(decoder, seed=len(name), head=head)
        loading.save(folder / name, Model(decoder), trainable(params), tokenizer)
    with_other_ids(folder / "reward", folder / "other")
    rng = np.random.default_rng(0)

    def words() -> str:
        said = "".join(rng.choice(WORDS, rng.integers(2, 9)))
        return said.strip() if chat else said

    def prompt() -> object:
        return [{"role": "user", "content": words()}] if chat else words()

    rows = [{"prompt": prompt(), "chosen": words(), "rejected": words()} for _ in range(60)]
    for name, part in (("train", rows[:40]), ("test", rows[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def settings(inputs: Path, workdir: Path, *more: str) -> tuple[str, ...]:
    return (
        str(MICRO), f"workdir={workdir}", f"model.path={inputs}/policy", "data.kind=pairs", "experiment=ppo_hard",
        f"data.path={inputs}/train.jsonl", f"data.test_path={inputs}/test.jsonl", "sft.train.steps=1",
        "ppo.train.eval_every=2", "runtime.save_minutes=0", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(inputs, tmp_path_factory) -> Path:
    """A finished run whose reward model has the policy's tokens."""
    workdir = tmp_path_factory.mktemp("shared")
    assert mpo("run", *settings(inputs, workdir, f"reward.path={inputs}/reward")) == 0
    return workdir


def log(workdir: Path, role: str) -> list[dict]:
    lines = (workdir / "runs" / "ppo_hard" / role / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(("timing", "perf", "state_"))}
        for line in lines
    ]


def scores(workdir: Path, run: str = "ppo_hard") -> PairTable:
    return PairTable.read(workdir / "runs" / run / "select")


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_same_reward_model_of_other_tokens_trains_the_same_policy(
    inputs, shared, tmp_path, capsys, monkeypatch, one_pass
):
    """Held-out pairs, selection, PPO with its evaluation, and evaluation; the critic is the shared run's."""
    load = Context.load_to_train

    def load_to_train(self, stage, path, numerics, text, **options):
        if options.pop("new_head", False) and stage == "ppo critic":
            return load(self, stage, inputs / "reward", numerics, text, head="value", **options)
        return load(self, stage, path, numerics, text, **options)

    monkeypatch.setattr(Context, "load_to_train", load_to_train)
    if one_pass:
        for given in ("reward", "other"):
            more = (f"reward.path={inputs}/{given}", "ppo.one_pass=true")
            assert mpo("run", *settings(inputs, tmp_path / given, *more)) == 0
        shared = tmp_path / "reward"
    else:
        assert mpo("run", *settings(inputs, tmp_path / "other", f"reward.path={inputs}/other")) == 0
    found = tmp_path / "other"
    assert "lose the start of their prompt" not in capsys.readouterr().out
    one, other = (manifest(folder, "ppo_hard", "reward")["summary"] for folder in (shared, found))
    assert one["held_out_accuracy"] == other["held_out_accuracy"]
    one, other = scores(shared), scores(found)
    assert np.std(one.score) > 0.1, "scores that are all alike show nothing"
    np.testing.assert_allclose(other.score, one.score, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(other.chosen, one.chosen)
    for a, b in zip(log(shared, "1-ppo"), log(found, "1-ppo"), strict=True):
        assert b.pop("objective/cut_rows") == 0 and b.pop("eval/objective/cut_rows", 0) == 0
        assert a.keys() == b.keys() and "objective/scores" in a
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
    assert any("eval/objective/scores" in line for line in log(found, "1-ppo"))
    one, other = (manifest(folder, "ppo_hard", "evaluate")["summary"] for folder in (shared, found))
    for name in ("score", "kl", "length"):
        assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


def test_rows_that_are_too_long_for_it_are_counted(inputs, tmp_path, capsys):
    """A reward model of so few positions that most rows lose the start of their prompt."""
    shutil.copytree(inputs / "other", tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 12}))
    assert mpo("run", *settings(inputs, tmp_path / "runs", f"reward.path={tmp_path}/short")) == 0
    said = re.search(r"(\d+) of 80 rows are longer than 12 tokens", " ".join(capsys.readouterr().out.split()))
    table = scores(tmp_path / "runs")
    rows = zip(table.prompt, table.response, strict=True)
    words = [len(f"{prompt}{text}".split()) for prompt, pair in rows for text in pair]
    assert said and 0 < sum(count > 12 for count in words) <= int(said[1]) <= sum(count > 11 for count in words) < 80
    shares = [line["objective/cut_rows"] for line in log(tmp_path / "runs", "1-ppo")]
    assert all(0 < share < 1 for share in shares) and {share * 8 % 1 for share in shares} == {0}


def test_its_artifact_has_its_tokens_and_the_critic_the_policy_s(inputs, shared, tmp_path, capsys):
    """The reward model keeps its tokenizer; the critic starts from the policy, with values of zero."""
    assert mpo("run", *settings(inputs, tmp_path, f"reward.path={inputs}/other")) == 0
    assert "the critic starts from the policy with a value head of zeros" in capsys.readouterr().out
    policy, own = (load_tokenizer(inputs / name).get_vocab() for name in ("policy", "other"))
    assert policy != own
    assert load_tokenizer(manifest_folder(tmp_path, "ppo_hard", "reward") / "model").get_vocab() == own
    trained = manifest_folder(tmp_path, "ppo_hard", "1-ppo")
    assert load_tokenizer(trained / "critic").get_vocab() == policy
    first, before = log(tmp_path, "1-ppo")[0], log(shared, "1-ppo")[0]
    assert first["objective/scores"] == pytest.approx(before["objective/scores"], rel=1e-4)
    assert first["critic/explained_variance"] == 0, "a critic that says 0 everywhere explains nothing"
    assert before["critic/explained_variance"] != 0


def check_scoring(inputs: Path, workdir: Path, model: Path) -> np.ndarray:
    """`mpo score` by the run's reward model and by the model itself gives the run's held-out gaps, which it returns."""
    stage = next((workdir / "stages").glob("reward-*"))
    gaps, _ = read_gaps(stage) or (np.zeros(0), None)
    assert len(gaps) == 20 and np.std(gaps) > 0.1
    for number, path in enumerate((stage, model)):
        out = workdir / f"scores-{number}.jsonl"
        assert mpo("score", str(path), f"{inputs}/test.jsonl", "--out", str(out), "--batch-size", "8") == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        found = np.asarray([row["score_chosen"] - row["score_rejected"] for row in rows])
        np.testing.assert_allclose(found, gaps, rtol=1e-5, atol=1e-5)
    return gaps


def in_transformers(model: Path, inputs: Path) -> np.ndarray:
    """The gaps of the test rows, each whole conversation by itself, as transformers tokenizes it, at its last token."""
    tokenizer, source = load_tokenizer(model), loading.open_model(model)
    params = weights.load_params(source.tensors, source.decoder, mesh_of(1, 1, 1), head="value", dtype="float32")

    def score(row: dict, side: str) -> float:
        turns = [*row["prompt"], {"role": "assistant", "content": row[side]}]
        ids = np.asarray([tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)])
        ones = np.ones_like(ids)
        tokens = Tokens(ids, np.arange(ids.shape[1])[None], ones, 0 * ones, ones > 0)
        return float(forward.scores(Model(source.decoder), params, tokens)[0, -1])

    rows = [json.loads(line) for line in (inputs / "test.jsonl").read_text().splitlines()]
    return np.asarray([score(row, "chosen") - score(row, "rejected") for row in rows])


@pytest.mark.parametrize("given", ["reward", "other"])
def test_text_that_a_template_writes_after_the_end_token_is_read(tmp_path, capsys, given):
    """As ChatML's line break: a classifier from elsewhere has its score there, whoever's tokens it has."""
    inputs = make_inputs(tmp_path, chat=True)
    for name in ("policy", "reward", "other"):
        (inputs / name / "chat_template.jinja").write_text(CHAT.replace("{{ eos_token }}", "{{ eos_token + ' w29' }}"))
    assert mpo("reward", *settings(inputs, tmp_path / "runs", f"reward.path={inputs}/{given}")) == 0
    gaps = check_scoring(inputs, tmp_path / "runs", inputs / given)
    np.testing.assert_allclose(gaps, in_transformers(inputs / given, inputs), rtol=1e-4, atol=1e-4)
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt": "<user> w1", "shown": "<user> w1", "response": "w2"}) + "\n")
    capsys.readouterr()
    assert mpo("score", str(inputs / given), str(rows), "--out", str(out)) == 2
    assert "its prompts are as the policy's chat template has written them" in " ".join(capsys.readouterr().err.split())


def test_a_reward_model_that_was_trained_here_is_read_at_the_end_token(tmp_path):
    """Whatever its template writes after it: there training had its score. Export and a second run keep that."""
    inputs = make_inputs(tmp_path, chat=True)
    (inputs / "policy" / "chat_template.jinja").write_text(CHAT.replace("{{ eos_token }}", "{{ eos_token + ' w29' }}"))
    assert mpo("reward", *settings(inputs, tmp_path / "runs", "reward.train.epochs=1")) == 0
    gaps = check_scoring(inputs, tmp_path / "runs", next((tmp_path / "runs" / "stages").glob("reward-*/model")))
    assert (
        np.abs(gaps - in_transformers(next((tmp_path / "runs" / "stages").glob("reward-*/model")), inputs)).max() > 0.01
    )
    stage = next((tmp_path / "runs" / "stages").glob("reward-*"))
    assert mpo("export", str(stage), str(tmp_path / "exported")) == 0
    assert mpo("reward", *settings(inputs, tmp_path / "again", f"reward.path={tmp_path}/exported")) == 0
    again = check_scoring(inputs, tmp_path / "again", tmp_path / "exported")
    np.testing.assert_allclose(again, gaps, rtol=1e-6, atol=1e-6)


def test_conversations_are_rendered_by_the_reward_model_s_own_template(tmp_path, written):
    """The same template, so the same rows, cut responses included; a function gets the turns."""
    inputs = make_inputs(tmp_path, chat=True)
    for given in ("reward", "other"):
        assert mpo("select", *settings(inputs, tmp_path / f"by-{given}", f"reward.path={inputs}/{given}")) == 0
    one, other = (
        PairTable.read(next((tmp_path / f"by-{given}" / "stages").glob("select-*"))) for given in ("reward", "other")
    )
    eos = word_tokenizer(chat=True).eos_token_id
    whole = np.asarray([[ids[-1] == eos for ids in pair] for pair in one.ids])
    assert whole.sum() > 10 and (~whole).sum() > 10
    assert np.std(one.score[whole]) > 0.1 and "<assistant>" in one.prompt[0]
    np.testing.assert_allclose(other.score, one.score, rtol=1e-5, atol=1e-5)
    summaries = [
        json.loads(next((tmp_path / f"by-{given}" / "stages").glob("reward-*/manifest.json")).read_text())["summary"]
        for given in ("reward", "other")
    ]
    assert summaries[0]["accuracy_by_gap"] == summaries[1]["accuracy_by_gap"]
    for given in ("reward", "other"):
        check_scoring(inputs, tmp_path / f"by-{given}", inputs / given)
    module = tmp_path / f"{written.partition(':')[0]}.py"
    body = "[len(p[-1]['content']) - len(r) / 8 for p, r in zip(prompts, responses)]"
    module.write_text(f"def brevity(prompts, responses):\n    return {body}\n")
    assert mpo("select", *settings(inputs, tmp_path / "by-function", f"reward.function={written}")) == 0
    table = PairTable.read(next((tmp_path / "by-function" / "stages").glob("select-*")))
    expected = [
        [len(re.sub(r"<\w+>|</s>", "", prompt).strip()) - len(text.strip()) / 8 for text in pair]
        for prompt, pair in zip(table.prompt, table.response, strict=True)
    ]
    np.testing.assert_allclose(table.score, expected)


@pytest.mark.parametrize("kind", ["path", "function"])
def test_selection_goes_on_after_a_kill_and_ends_equal(inputs, written, tmp_path, monkeypatch, kind):
    """Batches that are done are not scored again, and the table is the same to the bit."""
    given = f"reward.path={inputs}/other" if kind == "path" else f"reward.function={written}"
    more = (given, "select.batch_size=8")
    assert mpo("select", *settings(inputs, tmp_path / "whole", *more)) == 0
    check, done = Pass.check, []

    def stop(self):
        if "scores" in self.name:
            done.append(self.done)
            if len(done) == 2:
                self._parts.flush()
                raise PassPreempted(self.name, self.done, self.total)
        check(self)

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "check", stop)
        assert mpo("select", *settings(inputs, tmp_path / "killed", *more)) != 0
    begun = []
    earlier = Pass.earlier
    monkeypatch.setattr(Pass, "earlier", lambda self: (begun.append((self.name, self.done)), earlier(self))[1])
    assert mpo("select", *settings(inputs, tmp_path / "killed", *more)) == 0
    assert [rows for name, rows in begun if "scores" in name] == [done[-1]] and done[-1] > 0
    one, other = (PairTable.read(next((tmp_path / name / "stages").glob("select-*"))) for name in ("whole", "killed"))
    np.testing.assert_array_equal(one.score, other.score)
    assert list(one.response) == list(other.response)


@pytest.fixture
def written(tmp_path, monkeypatch) -> str:
    """A module with a function as reward in the current folder; its name is new to this process."""
    module = re.sub(r"\W", "_", tmp_path.name)
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(SCORES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    reward_function.load_function.cache_clear()
    return f"{module}:brevity"


def test_a_function_s_numbers_are_the_scores_everywhere(inputs, written, tmp_path):
    """Selection, PPO and evaluation, against the formula on the texts that they keep."""
    workdir = tmp_path / "runs"
    assert mpo("run", *settings(inputs, workdir, f"reward.function={written}")) == 0
    summary = manifest(workdir, "ppo_hard", "reward")["summary"]
    rows = [json.loads(line) for line in (inputs / "test.jsonl").read_text().splitlines()]
    gaps = [formula(row["prompt"], row["chosen"]) - formula(row["prompt"], row["rejected"]) for row in rows]
    right = (1 + np.sign(gaps)) / 2  # a tie is half right
    assert summary["held_out_accuracy"] == right.mean() and 0.5 in right and summary["function"] == written
    assert not (manifest_folder(workdir, "ppo_hard", "reward") / "model").exists()
    table = scores(workdir)
    expected = [
        [formula(prompt, text) for text in pair] for prompt, pair in zip(table.prompt, table.response, strict=True)
    ]
    np.testing.assert_allclose(table.score, expected, rtol=1e-6)
    samples = (workdir / "runs" / "ppo_hard" / "evaluate" / "samples.jsonl").read_text().splitlines()
    for sample in map(json.loads, samples):
        assert sample["score"] == pytest.approx(formula(sample["prompt"], sample["response"]))
    calls = sys.modules[written.partition(":")[0]].calls
    assert 8 in calls, "PPO's batches of 8 prompts"


def test_a_changed_function_makes_again_what_depends_on_it(inputs, written, tmp_path):
    """The file's content and the name count; where it lies does not."""
    from mpo_jax.pipeline.pipeline import Pipeline
    from mpo_jax.pipeline.table import Listing

    def names(function: str) -> dict[str, str]:
        config = load_config(None, settings(inputs, tmp_path / "none", f"reward.function={function}"))
        pipeline = Pipeline(config, Listing(tmp_path / "none", None))
        return {role: made.id for role, made in pipeline.experiment("ppo_hard").artifacts.items()}

    module = written.partition(":")[0]
    before = names(written)
    file = tmp_path / f"{module}.py"
    source = file.read_text()
    file.write_text(source + "\n# another rule\n")
    after = names(written)
    assert before["sft"] == after["sft"]
    assert not {before[role] for role in ("reward", "select", "1-ppo", "evaluate")} & set(after.values())
    file.write_text(source)
    assert names(written) == before
    file.write_text(source + "\nother = brevity\n")
    assert names(f"{module}:other") != names(written)
    assert module not in sys.modules, "naming stages runs no code"


def test_what_goes_wrong_in_a_function_is_said(inputs, written, tmp_path, capsys):
    """Before anything is made, and in the middle of a stage."""
    module = written.partition(":")[0]
    for function, message in (
        (f"{module}:brief", f"reward.function={module}:brief: {module} has no brief"),
        ("nowhere_at_all:f", "no file of a module nowhere_at_all"),
        ("brevity", "give module:name"),
    ):
        assert mpo("run", *settings(inputs, tmp_path / "runs", f"reward.function={function}")) == 2
        assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not list((tmp_path / "runs").glob("stages/*"))
    both = (f"reward.function={written}", f"reward.path={inputs}/reward")
    assert mpo("run", *settings(inputs, tmp_path / "runs", *both)) == 2
    assert "reward.path and reward.function are both given" in re.sub(r"\s+", " ", capsys.readouterr().err)
    reward_function.load_function(written)
    sys.modules[module].fail_at = 3
    assert mpo("select", *settings(inputs, tmp_path / "runs", f"reward.function={written}")) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"reward.function={written} fails at the prompt" in said and "RuntimeError: out of service" in said
