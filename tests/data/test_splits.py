"""mpo_jax.data.corpus: test prompts in no training set, which rows are prompts, and equal data for all experiments."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.registry import EXPERIMENTS, Step
from mpo_jax.config.schema import Config, DataConfig, ModelConfig, SelectConfig, TextConfig, ToyConfig
from mpo_jax.data import corpus as corpora
from mpo_jax.data import toy
from mpo_jax.data.corpus import fingerprint
from mpo_jax.data.hh import source_category
from mpo_jax.data.pair_table import PairTable
from mpo_jax.data.records import is_validation
from mpo_jax.data.splits import TESTED
from mpo_jax.data.tokens import TokenReport
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.stages import count_rows, stage_settings
from mpo_jax.pipeline.table import Listing
from mpo_jax.stages import dpo, ppo
from mpo_jax.stages.context import Context, Inputs
from mpo_jax.types import Artifact
from tests.models.tiny import mesh_of
from tests.pipeline.test_pipeline import MICRO

TOY = ToyConfig(num_demonstrations=20, num_pairs=30, num_test=5)


def write(path, rows) -> Any:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def context_of(config, folder) -> Context:
    return Context(mesh_of(1, 1, 1), folder, Inputs(config))


def load_corpus(data, **sections):
    return corpora.load_corpus(Config(data=data, **sections))


def number(prompt):
    """Of the post that a query of any layout is about."""
    return int(prompt.partition("Post ")[2].partition(".")[0])


def numbers(rows):
    return {number(row if isinstance(row, str) else row.prompt) for row in rows}


def fields(n):
    return {"id": f"t3_{n}", "subreddit": "work", "title": f"Boss {n}", "post": f"Post {n}.\n\nHe yells. "}


def query(n, between="\n\n"):
    return f"SUBREDDIT: r/work{between}TITLE: Boss {n}{between}POST: Post {n}.{between}He yells."


COMPARISONS = {
    "info": lambda n: {"info": fields(n), "summaries": [{"text": "a"}, {"text": "b"}], "choice": n % 2},
    "ready": lambda n: {"prompt": query(n) + "\n\nTL;DR:", "chosen": "a", "rejected": "b"},
    "end in the summaries": lambda n: {"prompt": query(n, "\n"), "chosen": "TL;DR: a", "rejected": "TL;DR: b"},
}
DEMONSTRATIONS = {
    "fields": lambda n: {**fields(n), "id": f"other {n}", "summary": f"own {n}"},
    "ready": lambda n: {"prompt": query(n) + " \n\nTL;DR: ", "completion": f" own {n}"},
    "one line": lambda n: {"prompt": query(n, " ") + "\nTL;DR:", "label": f"own {n}"},
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("demonstration", DEMONSTRATIONS)
@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("tests", ["validation", "test_path", "test_prompt_path"])
def test_no_held_out_post_is_in_any_training_set(tmp_path, chat_model, tests, comparison, demonstration, chat):
    """The layouts spell one post differently; the reward model alone does without the validation rows of a test set."""
    compare, show = COMPARISONS[comparison], DEMONSTRATIONS[demonstration]
    path = write(tmp_path / "pairs.jsonl", [compare(n) for n in range(100) for _ in range(2)])
    data = {"path": path, "sft_path": write(tmp_path / "sft.jsonl", [show(n) for n in range(50, 150)]),
            "prompt_path": write(tmp_path / "prompts.jsonl", [show(n) for n in range(120)])}  # fmt: skip
    if tests != "validation":
        row = compare if tests == "test_path" else show
        data[tests] = write(tmp_path / "tests.jsonl", [row(n) for n in (*range(90, 110), 500)])
    config = DataConfig.model_validate({"kind": "tldr", "validation_fraction": 0.3, **data})
    corpus = load_corpus(config, text=TextConfig(chat=chat), model=chat_model)
    tested = numbers(corpus.test_prompts)
    assert tested == {*range(90, 110), 500} if tests != "validation" else 10 < len(tested) < 60
    assert tested >= numbers(corpus.held_out)
    for rows in (corpus.demonstrations, corpus.pairs, corpus.reward_pairs, corpus.prompts):
        assert rows and not numbers(rows) & tested
    assert not numbers(corpus.reward_pairs) & numbers(corpus.validation)
    if tests == "validation":
        assert corpus.validation == corpus.held_out and corpus.pairs == corpus.reward_pairs
    else:
        # but for the test prompts, no stage but the reward model loses a row
        assert numbers(corpus.pairs) == set(range(90)) and len(corpus.pairs) == 180
        assert numbers(corpus.demonstrations) == {*range(50, 90), *range(110, 150)}
        assert numbers(corpus.prompts) == {*range(90), *range(110, 120)}
        assert len(corpus.reward_pairs) + len(corpus.validation) == 180 and corpus.validation
    reports = {report.source.rpartition("/")[2]: report for report in corpus.reports}
    assert reports["sft.jsonl"].dropped[TESTED] == len(tested & set(range(50, 150)))
    assert reports["pairs.jsonl"].dropped[TESTED] == (0 if tests == "validation" else 20)
    assert reports["prompts.jsonl"].dropped[TESTED] == len(tested & set(range(120)))
    assert all(r.read == r.kept + sum(r.dropped.values()) for r in corpus.reports)


def test_a_layout_does_not_change_the_validation_split(tmp_path):
    held = []
    for name, compare in COMPARISONS.items():
        path = write(tmp_path / f"{name}.jsonl", [compare(n) for n in range(200)])
        held.append(numbers(load_corpus(DataConfig(kind="tldr", path=path, validation_fraction=0.2)).held_out))
    assert held[0] == held[1] == held[2] and 20 < len(held[0]) < 60
    group = query(7, " ")
    assert (7 in held[0]) == is_validation(group, seed=0, fraction=0.2)


@pytest.mark.parametrize("kind", ["pairs", "hh"])
def test_a_conversation_and_its_plain_text_are_one_prompt(tmp_path, chat_model, kind):
    rows = [f"\n\nHuman: q {n}\n\nAssistant:" if kind == "hh" else f"q {n}" for n in range(40)]
    path = write(tmp_path / "a.jsonl", [{"chosen": f"{p} a", "rejected": f"{p} b", "prompt": p} for p in rows])
    turns = [[{"role": "user", "content": f" q  {n}"}] for n in range(60)]
    sft = write(tmp_path / "sft.jsonl", [{"messages": [*t, {"role": "assistant", "content": "a"}]} for t in turns])
    tests = write(tmp_path / "t.jsonl", [{"prompt": rows[3]}, {"prompt": turns[4]}, {"prompt": rows[3]}])
    corpus = load_corpus(DataConfig(kind=kind, path=path, sft_path=sft, test_prompt_path=tests), model=chat_model)
    assert (len(corpus.pairs), len(corpus.demonstrations), len(corpus.test_prompts)) == (38, 58, 2)


# which rows are prompts


def test_prompts_are_rows_or_distinct(tmp_path):
    """The same in TL;DR's layout, where a post has several comparisons."""
    path = write(tmp_path / "a.jsonl", [COMPARISONS["info"](n % 2000) for n in range(10000)])
    config = DataConfig(kind="tldr", path=path, validation_fraction=0)
    assert len(load_corpus(config).prompts) == 10000
    unique = load_corpus(config.model_copy(update={"prompts": "unique"})).prompts
    assert len(unique) == len(set(unique)) == 2000
    assert "10000 prompts to sample from (2000 distinct)" in load_corpus(config).sizes


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("pairs", {"prompt": "x"}),
        ("pairs", {"prompt": "x", "response": "y"}),
        ("pairs", {"prompt": "x", "chosen": "y", "rejected": "z"}),
        ("hh", {"prompt": "x"}),
        ("hh", {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: z"}),
        ("tldr", {"prompt": "x", "completion": "y"}),
        ("tldr", {"prompt": "x", "chosen": "y", "rejected": "z"}),
    ],
)
def test_test_prompts_come_from_rows_of_any_kind(tmp_path, kind, row):
    own = {"hh": [{"chosen": f"\n\nHuman: {n}\n\nAssistant: a", "rejected": f"\n\nHuman: {n}\n\nAssistant: b"}
                  for n in range(60)]}.get(kind, [{"prompt": f"{n}", "chosen": "a", "rejected": "b"}
                                                  for n in range(60)])  # fmt: skip
    data: dict[str, Any] = {"kind": kind, "path": write(tmp_path / "a.jsonl", own), "validation_fraction": 0.2}
    tests = write(tmp_path / "t.jsonl", [row, row])
    corpus = load_corpus(DataConfig(**data, test_prompt_path=tests))
    asked = row["chosen"].removesuffix(" y") if kind == "hh" and "chosen" in row else "x"
    assert corpus.test_prompts == [asked] and len(corpus.pairs) == 60
    # reward accuracy needs pairs: the validation rows, unless there are test pairs
    assert corpus.held_out == [] and corpus.reward_test == corpus.validation != []
    more = write(tmp_path / "p.jsonl", own[:5])
    corpus = load_corpus(DataConfig(**data, test_prompt_path=tests, test_path=more))
    assert corpus.test_prompts == [asked] and corpus.reward_test == corpus.held_out and len(corpus.held_out) == 5
    assert len(corpus.pairs) == 55


def test_test_prompts_alone_can_be_evaluated_on(tmp_path):
    data = {"kind": "pairs", "path": "a", "validation_fraction": 0}
    assert not DataConfig.model_validate(data).has_test_prompts
    assert DataConfig.model_validate({**data, "test_prompt_path": "b"}).has_test_prompts
    assert not DataConfig.model_validate({**data, "test_prompt_path": "b"}).holds_out


def test_the_fingerprint_has_the_new_keys(tmp_path):
    path = write(tmp_path / "a.jsonl", [COMPARISONS["ready"](n) for n in range(9)])
    config = DataConfig(kind="tldr", path=path)
    changes = ({"prompts": "unique"}, {"test_prompt_path": (path,)}, {"test_path": (path,)}, {"prompt_path": (path,)})
    assert len({fingerprint(config.model_copy(update=change)) for change in ({}, *changes)}) == 5
    worlds = ({}, {"prompts": "unique"}, {"validation_fraction": 0.1})
    assert len({fingerprint(DataConfig.model_validate(change)) for change in worlds}) == 3


# categories


@pytest.mark.parametrize(
    ("place", "category"),
    [
        ("hub:Anthropic/hh-rlhf:helpful-base:test row 3", "helpful"),
        ("/data/helpful/harmless-base.test.jsonl.gz:12", "harmless"),
        ("hh/harmless-base/test.parquet row 1", "harmless"),
        ("helpful-and-harmless/test.jsonl:1", None),
        ("hh/test.jsonl:1", None),
        ("/data/unhelpful/rows.jsonl:2", None),
    ],
)
def test_hh_s_sources_name_categories(place, category):
    assert source_category(place) == category


def test_categories_of_test_prompts(tmp_path):
    """Named by the rows that are tested on, whatever other sources say of the same prompt."""

    def dialogues(*names):
        return [{"chosen": f"\n\nHuman: {n}\n\nAssistant: a", "rejected": f"\n\nHuman: {n}\n\nAssistant: b"}
                for n in names]  # fmt: skip

    harmless = dialogues("r", "both")
    harmless[0]["category"] = "safe"
    tests = (write(tmp_path / "helpful-base.jsonl", dialogues("p", "q", "both")),
             write(tmp_path / "harmless-base.jsonl", harmless))  # fmt: skip
    path = write(tmp_path / "harmless-train" / "a.jsonl", dialogues(*"pxyz"))
    config = DataConfig(kind="hh", path=path, test_path=tests, validation_fraction=0)
    corpus = load_corpus(config)
    found = [corpus.category(prompt) for prompt in corpus.test_prompts]
    assert found == ["helpful", "helpful", None, "safe"] and corpus.category("unknown") is None
    assert [row.category for row in corpus.held_out] == ["helpful"] * 3 + ["safe", "harmless"]
    # the name decides, so that it is part of what the rows depend on
    renamed = write(tmp_path / "helpful-train" / "a.jsonl", dialogues(*"pxyz"))
    assert fingerprint(config) != fingerprint(config.model_copy(update={"path": (renamed,)}))


def test_a_tldr_prompt_s_category_is_its_subreddit(tmp_path):
    rows = [COMPARISONS["info"](1), COMPARISONS["ready"](2), {**COMPARISONS["ready"](3), "category": "mine"}]
    rows.append({"prompt": "no subreddit TL;DR:", "chosen": "a", "rejected": "b", "subreddit": "tea"})
    path = write(tmp_path / "a.jsonl", [COMPARISONS["info"](n) for n in range(9, 30)])
    tests = write(tmp_path / "t.jsonl", rows)
    corpus = load_corpus(DataConfig(kind="tldr", path=path, test_path=tests))
    assert list(map(corpus.category, corpus.test_prompts)) == ["r/work", "r/work", "mine", "r/tea"]


# equal data


@pytest.mark.parametrize("prompts", ["rows", "unique"])
@pytest.mark.parametrize("own_prompts", [False, True])
def test_a_part_of_the_prompts_is_the_data_of_all(tmp_path, prompts, own_prompts):
    posts = [n % 40 for n in range(100)]
    path = write(tmp_path / "a.jsonl", [COMPARISONS["info"](n) for n in posts])
    own = write(tmp_path / "p.jsonl", [{"prompt": query(n)} for n in range(200, 300)])
    data = {"kind": "tldr", "path": path, "prompts": prompts, "validation_fraction": 0}
    corpus = load_corpus(DataConfig.model_validate({**data, "prompt_path": own if own_prompts else ()}))
    sampled, pairs = corpus.sampled_prompts(30), corpus.human_pairs(30)
    assert sampled == corpus.prompts[:30]
    if own_prompts or prompts == "rows":
        assert pairs == corpus.pairs[:30]
    else:
        assert pairs == [row for row in corpus.pairs if row.prompt in set(sampled)]
        assert len(pairs) == 80 and numbers(pairs) == set(range(30))
    if not own_prompts:
        assert {row.prompt for row in pairs} == set(sampled)
    assert (corpus.sampled_prompts(None), corpus.human_pairs(None)) == (corpus.prompts, corpus.pairs)


@pytest.mark.parametrize("experiment", ["ppo", "dpo_base", "dpo", "ppo_hard"])
def test_the_part_is_in_every_step_s_name(tmp_path, experiment):
    names = []
    for overrides in ((), ("select.num_prompts=8",), ("select.num_prompts=9",)):
        config = load_config(MICRO, (f"workdir={tmp_path}", *overrides))
        pipeline = Pipeline(config, Listing(tmp_path))
        sft = pipeline.sft()
        names.append(pipeline.step(EXPERIMENTS[experiment][0], sft, sft, pipeline.reward(sft)).id)
    assert len(set(names)) == 3


@pytest.mark.parametrize(("prompts", "expected"), [("rows", ["p", "q", "p"]), ("unique", ["p", "q"])])
def test_ppo_on_a_subset_has_its_rows(tmp_path, prompts, expected):
    none = np.full((4, 2), np.nan)
    gap = np.asarray([0.5, 2.0, 0.25, 0.75], np.float32)
    pair: Any = [([1], [2])] * 4
    PairTable(["p", "x", "q", "p"], [("a", "b")] * 4, pair, none, np.zeros(4, np.int32), gap, none).write(tmp_path)
    config = Config(data=DataConfig(prompts=prompts))
    settings = stage_settings("ppo", config, Step("ppo", "hard"))
    assert ppo._prompts(settings, Artifact(tmp_path, {}), context_of(config, tmp_path)) == expected


def test_the_stages_take_their_part(tmp_path, monkeypatch):
    """Selection, PPO on all and DPO-base: the same five rows of the toy world."""
    config = Config(data=DataConfig(toy=TOY), select=SelectConfig(num_prompts=5))
    corpus = corpora.load_corpus(config)
    context = context_of(config, tmp_path)
    assert ppo._prompts(stage_settings("ppo", config, Step("ppo")), None, context) == corpus.prompts[:5]
    codec: Any = SimpleNamespace(config=TextConfig())
    monkeypatch.setattr("mpo_jax.stages.context.tokenize", lambda _codec, rows, **_: (rows, TokenReport()))
    split = stage_settings("dpo", config, Step("dpo", human_pairs=True)).split
    rows = context.inputs.corpus.human_pairs(split.num_prompts)
    assert dpo._human_examples(context, codec, rows) == [(r.prompt, (r.chosen, r.rejected)) for r in corpus.pairs[:5]]
    amounts = count_rows(config, corpus)
    assert (amounts.human_pairs, amounts.prompts, amounts.selected) == (5, 5, 5)
