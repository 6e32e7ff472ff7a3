"""mpo_jax.data.corpus: from files or the toy world to disjoint sets, and a fingerprint of all that they depend on."""

import json
from collections import Counter
from typing import Any

import pytest

from mpo_jax.config.schema import Config, DataConfig, ModelConfig, SftConfig, TextConfig, ToyConfig
from mpo_jax.data import corpus as corpora
from mpo_jax.data import toy
from mpo_jax.data.corpus import _advice, base_tokenizer, fingerprint
from mpo_jax.data.records import DataReport, is_validation
from mpo_jax.data.splits import TESTED
from mpo_jax.errors import UserError
from mpo_jax.runtime.stage_warnings import collect_warnings

TOY = ToyConfig(num_demonstrations=30, num_pairs=40, num_test=10)


def write(path, rows) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load_corpus(data, **sections):
    return corpora.load_corpus(Config(data=data, **sections))


def pairs(begin, end, times=1):
    return [{"prompt": f"prompt {i % end}", "chosen": f" good {i}", "rejected": f" bad {i}"}
            for i in range(begin, begin + times * (end - begin))]  # fmt: skip


def dialogues(begin, end):
    prompts = [f"\n\nHuman: prompt {i}\n\nAssistant:" for i in range(begin, end)]
    return [{"chosen": f"{p} good\n\nstill", "rejected": f"{p} bad"} for p in prompts]


def prompts(rows):
    return {row.prompt for row in rows}


@pytest.mark.parametrize(("kind", "make"), [("pairs", pairs), ("hh", dialogues)])
def test_files_are_split_by_prompt_into_disjoint_sets(tmp_path, kind, make):
    first, second = write(tmp_path / "1.jsonl", make(0, 300)), write(tmp_path / "2.jsonl", make(300, 500))
    config = DataConfig(kind=kind, path=(first, second), validation_fraction=0.2)
    corpus = load_corpus(config)
    assert len(corpus.pairs) + len(corpus.held_out) == 500
    assert len(prompts(corpus.pairs) | prompts(corpus.held_out)) == 500
    assert all(is_validation(row.group, seed=0, fraction=0.2) for row in corpus.held_out)
    assert not any(is_validation(row.group, seed=0, fraction=0.2) for row in corpus.pairs)
    assert 64 <= len(corpus.held_out) <= 136  # 4 standard deviations around 100
    assert [(r.source, r.read, r.kept) for r in corpus.reports] == [(first, 300, 300), (second, 200, 200)]
    assert corpus.utility is None
    # without files of its own, SFT imitates the chosen side of the training rows alone
    assert [(d.prompt, d.response) for d in corpus.demonstrations] == [(p.prompt, p.chosen) for p in corpus.pairs]
    swapped = load_corpus(config.model_copy(update={"path": (second, first)}))
    assert prompts(swapped.held_out) == prompts(corpus.held_out)


def test_interleaved_files_are_read_in_turns_in_proportion_to_their_rows(tmp_path):
    first, second = write(tmp_path / "1.jsonl", pairs(0, 300)), write(tmp_path / "2.jsonl", pairs(300, 400))
    asked = write(tmp_path / "3.jsonl", pairs(400, 430)), write(tmp_path / "4.jsonl", pairs(430, 440))
    config = DataConfig(kind="pairs", path=(first, second), test_prompt_path=asked, validation_fraction=0.2)
    whole = load_corpus(config)
    mixed = load_corpus(config.model_copy(update={"order": "interleaved"}))

    def numbers(prompts):
        return [int(prompt.removeprefix("prompt ")) for prompt in prompts]

    for name in ("pairs", "demonstrations", "reward_pairs", "validation"):
        rows, before = (numbers(row.prompt for row in getattr(corpus, name)) for corpus in (mixed, whole))
        assert sorted(rows) == before
        of_first = [n for n in rows if n < 300]
        assert of_first == sorted(of_first)
    assert fingerprint(config) != fingerprint(config.model_copy(update={"order": "interleaved"}))
    # the share of the second file is the same in the first rows as in all
    for rows in (numbers(mixed.prompts), [n - 130 for n in numbers(mixed.test_prompts)]):
        for count in (20, len(rows)):
            assert abs(sum(n >= 300 for n in rows[:count]) - count / 4) <= 1


def test_all_rows_of_a_prompt_fall_on_one_side(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(0, 50, times=4))
    config = DataConfig(kind="pairs", path=path, validation_fraction=0.3)
    assert load_corpus(config).prompts == [row.prompt for row in load_corpus(config).pairs]
    corpus = load_corpus(config.model_copy(update={"prompts": "unique"}))
    assert len(corpus.pairs) + len(corpus.held_out) == 200
    assert not prompts(corpus.pairs) & prompts(corpus.held_out)
    assert corpus.prompts == list(dict.fromkeys(row.prompt for row in corpus.pairs))
    assert len(corpus.prompts) + len(corpus.test_prompts) == 50
    assert len(corpus.pairs) == 4 * len(corpus.prompts)


def test_demonstrations_of_their_own_stay_out_of_the_held_out_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(0, 200))
    sft = write(tmp_path / "sft.jsonl", [{"prompt": f"prompt {i}", "response": f" own {i}"} for i in range(250)])
    corpus = load_corpus(DataConfig(kind="pairs", path=path, sft_path=sft, validation_fraction=0.2))
    assert all(d.response.startswith(" own") for d in corpus.demonstrations)
    assert not prompts(corpus.demonstrations) & prompts(corpus.held_out)
    assert prompts(corpus.demonstrations) >= prompts(corpus.pairs)
    report = corpus.reports[-1]
    assert (report.source, report.kept) == (sft, len(corpus.demonstrations))
    assert dict(report.dropped) == {
        TESTED: len(corpus.held_out),
        "validation prompt": 250 - len(corpus.held_out) - len(corpus.demonstrations),
    }


def test_test_files_replace_the_validation_rows(tmp_path):
    path, test = write(tmp_path / "a.jsonl", pairs(0, 200)), write(tmp_path / "t.jsonl", pairs(500, 520))
    corpus = load_corpus(DataConfig(kind="pairs", path=path, test_path=test, validation_fraction=0.2))
    assert corpus.test_prompts == [f"prompt {i}" for i in range(500, 520)]
    # the validation rows are kept from the reward model alone
    assert len(corpus.pairs) == len(corpus.demonstrations) == len(corpus.prompts) == 200
    assert corpus.validation == [row for row in corpus.pairs if is_validation(row.group, seed=0, fraction=0.2)]
    assert corpus.reward_pairs == [row for row in corpus.pairs if row not in corpus.validation]
    assert 17 <= len(corpus.validation) <= 63  # 4 standard deviations around 40
    everything = load_corpus(DataConfig(kind="pairs", path=path, test_path=test, validation_fraction=0.0))
    assert everything.reward_pairs == everything.pairs == corpus.pairs and everything.validation == []


def test_filter_and_max_rows_reach_the_reader(tmp_path):
    same = {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: y"}
    path = write(tmp_path / "a.jsonl", [same, *dialogues(0, 99)])
    test = write(tmp_path / "t.jsonl", dialogues(200, 210))
    config = DataConfig(kind="hh", path=path, test_path=test, validation_fraction=0.0)
    sizes = {
        (strict, rows): len(load_corpus(config.model_copy(update={"filter": strict, "max_rows": rows})).pairs)
        for strict in ("strict", "none")
        for rows in (None, 5)
    }
    assert sizes == {("strict", None): 99, ("strict", 5): 4, ("none", None): 100, ("none", 5): 5}


def test_real_hh_is_split(shared_data):
    path = shared_data / "hh-rlhf" / "harmless-base.test.jsonl.gz"
    corpus = load_corpus(DataConfig(kind="hh", path=(str(path),)))
    assert len(corpus.pairs) + len(corpus.held_out) == 2299
    assert 74 <= len(corpus.held_out) <= 157  # 5% of 2299 within 4 standard deviations
    assert not prompts(corpus.pairs) & prompts(corpus.held_out)


def test_the_kind_chooses_the_readers(tmp_path):
    dialogue = "\n\nHuman: x\n\nAssistant:"
    row = {"prompt": "p", "chosen": f"{dialogue} y", "rejected": f"{dialogue} z"}
    path = write(tmp_path / "a.jsonl", [row])
    found = {
        kind: load_corpus(DataConfig(kind=kind, path=path, validation_fraction=0.0)).pairs[0]
        for kind in ("pairs", "hh", "tldr")
    }
    assert [(row.prompt, row.chosen) for row in found.values()] == [
        ("p", f"{dialogue} y"), (dialogue, " y"), ("p", " " + f"{dialogue} y".lstrip()),
    ]  # fmt: skip


def test_a_fraction_of_0_holds_nothing_out(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(0, 200))
    corpus = load_corpus(DataConfig(kind="pairs", path=path, validation_fraction=0))
    assert [row.prompt for row in corpus.pairs] == [f"prompt {i}" for i in range(200)]
    assert len(corpus.demonstrations) == 200 and corpus.held_out == []


def test_a_test_set_without_rows_is_not_replaced(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(0, 200))
    test = write(tmp_path / "t.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}])
    with pytest.raises(UserError, match=r"no held-out pairs\. .*t\.jsonl: 1 row read, 0 kept"):
        load_corpus(DataConfig(kind="pairs", path=path, test_path=test, validation_fraction=0.2))


# TL;DR


def tldr(begin, end):
    """Every third row without a preference."""
    preferred = (None, "reference", "model_1b")
    return [{"prompt": f"POST: {i}\n\nTL;DR:", "reference": f"own {i}", "model_1b": f"model {i}",
             "preferred": preferred[i % 3]} for i in range(begin, end)]  # fmt: skip


def test_tldr_imitates_all_references_of_the_training_side(tmp_path):
    path = write(tmp_path / "a.jsonl", tldr(0, 300))
    corpus = load_corpus(DataConfig(kind="tldr", path=path, validation_fraction=0.2))
    assert len(corpus.pairs) + len(corpus.held_out) == 200 and len(corpus.demonstrations) > len(corpus.pairs)
    assert {d.response for d in corpus.demonstrations} == {
        f" own {i}" for i in range(300) if not is_validation(f"POST: {i}", seed=0, fraction=0.2)
    }
    assert not prompts(corpus.demonstrations) & prompts(corpus.held_out)
    reports = [(r.source, r.read, r.kept, dict(r.dropped)) for r in corpus.reports]
    assert reports[0] == (path, 300, 200, {"no preference": 100})
    kept, tested = len(corpus.demonstrations), len(corpus.held_out)
    dropped = {TESTED: tested, "validation prompt": 300 - kept - tested}
    assert reports[1:] == [(f"{path} (references)", 300, kept, dropped)]


def test_tldr_imitates_chosen_summaries_or_files_of_its_own(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{i} TL;DR:", "chosen": "a", "rejected": "b"} for i in range(99)])
    corpus = load_corpus(DataConfig(kind="tldr", path=path))
    assert [(d.prompt, d.response) for d in corpus.demonstrations] == [(p.prompt, " a") for p in corpus.pairs]
    sft = write(tmp_path / "sft.jsonl", [{"prompt": f"{i} TL;DR:", "label": "own"} for i in range(99)])
    corpus = load_corpus(DataConfig(kind="tldr", path=path, sft_path=sft))
    assert {d.response for d in corpus.demonstrations} == {" own"}
    assert prompts(corpus.demonstrations) == prompts(corpus.pairs) and len(corpus.pairs) < 99


def test_news_are_kept_on_request(tmp_path):
    rows = [{"info": {"id": str(i), "article": f"News {i}."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
            for i in range(9)]  # fmt: skip
    path, test = write(tmp_path / "a.jsonl", rows), write(tmp_path / "t.jsonl", tldr(0, 9))
    config = DataConfig(kind="tldr", path=path, test_path=test, prompt_path=path, validation_fraction=0.0)
    with pytest.raises(UserError, match=r"no demonstrations, pairs, prompts. .*9 dropped: news article"):
        load_corpus(config)
    corpus = load_corpus(config.model_copy(update={"keep_news": True}))
    assert len(corpus.pairs) == len(corpus.prompts) == 9 and corpus.prompts[0] == "Article:\nNews 0.\n\nTL;DR:"


def test_real_tldr_is_split(shared_data):
    path = shared_data / "tldr" / "tldr_1945.sft_and_pairs.jsonl.gz"
    corpus = load_corpus(DataConfig(kind="tldr", path=(str(path),)))
    assert len(corpus.pairs) + len(corpus.held_out) == 1000
    assert 23 <= len(corpus.held_out) <= 77  # 5% of 1000 within 4 standard deviations
    assert 1810 <= len(corpus.demonstrations) <= 1886  # 95% of 1945, likewise
    assert not (prompts(corpus.demonstrations) | set(corpus.prompts)) & prompts(corpus.held_out)


# prompts


@pytest.mark.parametrize(("kind", "make"), [("pairs", pairs), ("hh", dialogues), ("tldr", tldr)])
def test_prompts_of_their_own_are_used_as_they_are_but_for_the_tests(tmp_path, kind, make):
    path = write(tmp_path / "a.jsonl", make(0, 200))
    config = DataConfig(kind=kind, path=path, validation_fraction=0.2)
    held_out = load_corpus(config).test_prompts
    fresh = [f"fresh {i}" for i in range(100)]
    rows = [{"prompt": prompt} for prompt in (*fresh, *held_out[:2], "fresh 3", " ")]
    own = write(tmp_path / "p.jsonl", rows), write(tmp_path / "q.jsonl", [{"prompt": "fresh 1"}, {"prompt": "last"}])
    corpus = load_corpus(config.model_copy(update={"prompt_path": own}))
    assert corpus.prompts == [*fresh, "fresh 3", "fresh 1", "last"]
    dropped = {"empty prompt": 1, "also a test prompt": 2}
    assert corpus.reports[-2].to_dict() == {"source": own[0], "read": 104, "kept": 101, "dropped": dropped}
    corpus = load_corpus(config.model_copy(update={"prompt_path": own, "prompts": "unique"}))
    assert corpus.prompts == [*fresh, "last"]
    assert any(is_validation(prompt, seed=0, fraction=0.2) for prompt in corpus.prompts)
    assert corpus.test_prompts == held_out and corpus.pairs == load_corpus(config).pairs
    reports = [report.to_dict() for report in corpus.reports[-2:]]
    dropped = {"empty prompt": 1, "also a test prompt": 2, "repeated prompt": 1}
    assert reports[0] == {"source": own[0], "read": 104, "kept": 100, "dropped": dropped}
    assert reports[1] == {"source": own[1], "read": 2, "kept": 1, "dropped": {"repeated prompt": 1}}
    # rows of the kind's own layout do as well
    again = load_corpus(config.model_copy(update={"prompt_path": (path,)}))
    assert not set(again.prompts) & set(again.test_prompts)
    assert set(again.prompts) >= set(load_corpus(config).prompts)


def test_no_prompts_left_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(0, 20))
    test = write(tmp_path / "t.jsonl", pairs(20, 40))
    config = DataConfig(kind="pairs", path=path, test_path=test, prompt_path=test, validation_fraction=0.0)
    with pytest.raises(UserError, match=r"no prompts. .*20 dropped: also a test prompt.*hold the same prompts"):
        load_corpus(config)


# conversations


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder))


CHAT = TextConfig(chat=True)


@pytest.mark.parametrize(
    ("kind", "make", "first"),
    [
        ("pairs", pairs, "<user>prompt 0<eos><assistant>"),
        ("hh", dialogues, "<user>prompt 0<eos><assistant>"),
        ("tldr", tldr, "<user>POST: 1\n\nTL;DR:<eos><assistant>"),
    ],
)
def test_a_chat_renders_every_kind_and_changes_no_split(tmp_path, chat_model, kind, make, first):
    path = write(tmp_path / "a.jsonl", make(0, 100))
    own = [{"prompt": "\n\nHuman: x\n\nAssistant:", "response": " y"}] * 3
    sft = write(tmp_path / "sft.jsonl", own)
    config = DataConfig(kind=kind, path=path, sft_path=sft, validation_fraction=0.2)
    plain, chat = load_corpus(config), load_corpus(config, text=CHAT, model=chat_model)
    assert [row.group for row in chat.pairs] == [row.group for row in plain.pairs]
    assert first in chat.prompts + chat.test_prompts
    assert all(row.prompt.startswith("<user>") and not row.chosen.startswith(" ") for row in chat.pairs)
    asked = "x" if kind == "hh" else "\n\nHuman: x\n\nAssistant:"
    assert chat.demonstrations[0].prompt == f"<user>{asked}<eos><assistant>" and chat.demonstrations[0].response == "y"


def test_conversations_use_the_models_template_and_only_they(tmp_path, chat_model):
    rows = [{"prompt": [{"role": "user", "content": f"q {i}"}], "chosen": "a", "rejected": "b"} for i in range(99)]
    path, plain = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", pairs(0, 99))
    corpus = load_corpus(DataConfig(kind="pairs", path=path), model=chat_model)
    assert corpus.prompts[0].startswith("<user>q ")
    with pytest.raises(UserError, match=r"a\.jsonl:1: data\.kind=pairs needs model\.path"):
        load_corpus(DataConfig(kind="pairs", path=path))
    assert load_corpus(DataConfig(kind="pairs", path=plain)).prompts[0].startswith("prompt ")


def test_system_turns_that_a_template_ignores_are_said_with_their_count(tmp_path, chat_model):
    template = tmp_path / "user.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}")
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    rows = [{"prompt": turns, "chosen": "a", "rejected": f"b {i}"} for i in range(9)]
    data = DataConfig(kind="pairs", path=write(tmp_path / "a.jsonl", rows), validation_fraction=0)
    with collect_warnings() as said:
        load_corpus(data, model=chat_model, text=TextConfig(chat_template=str(template)))
    assert any(line.startswith("9 conversations have a system turn that the chat template leaves out") for line in said)


def test_the_corpus_is_kept_for_what_it_depends_on(tmp_path, chat_model):
    data = DataConfig(kind="pairs", path=write(tmp_path / "a.jsonl", pairs(0, 99)))
    first = load_corpus(data, model=chat_model)
    assert load_corpus(data, model=chat_model, seed=3, sft=SftConfig(), text=TextConfig(max_prompt_tokens=9)) is first
    assert load_corpus(data, model=chat_model, text=CHAT) is not first


def test_a_template_from_a_file_replaces_the_tokenizers(tmp_path, chat_model):
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}{% if effort == 'low' %}!{% endif %}|{% endfor %}")
    data = DataConfig(kind="pairs", path=write(tmp_path / "a.jsonl", pairs(0, 99)))
    text = TextConfig(chat=True, chat_template=str(other))
    assert load_corpus(data, model=chat_model, text=text).prompts[0].endswith("|")
    options = text.model_copy(update={"template_options": (("effort", "low"),)})
    assert load_corpus(data, model=chat_model, text=options).prompts[0].endswith("!|")
    config = Config(data=data, model=chat_model, text=text)
    assert base_tokenizer(config).chat_template == other.read_text()
    before = fingerprint(data, chat_template=str(other))
    assert before != fingerprint(data)
    other.write_text(other.read_text() + "\n")
    assert fingerprint(data, chat_template=str(other)) != before
    other.unlink()
    with pytest.raises(UserError, match=r"text\.chat_template=.*: cannot read the file"):
        base_tokenizer(config)


# the toy world


def test_the_toy_world_has_no_chats():
    with pytest.raises(UserError, match=r"text\.chat=true needs rows from files"):
        load_corpus(DataConfig(toy=TOY), text=CHAT)


def test_the_toy_world_brings_its_utility():
    corpus = load_corpus(DataConfig(toy=TOY))
    assert (len(corpus.demonstrations), len(corpus.pairs), len(corpus.held_out)) == (30, 40, 10)
    assert {report.source: report.kept for report in corpus.reports} == {
        "toy preferences": 40, "toy test preferences": 10, "toy demonstrations": 30
    }  # fmt: skip
    assert corpus.utility is toy.utility
    assert corpus.prompts == [row.prompt for row in toy.preferences(TOY, test=False)]
    assert (corpus.pairs, corpus.held_out) == (toy.preferences(TOY, test=False), toy.preferences(TOY, test=True))


def test_the_toy_world_is_split_like_any_other():
    """A world so small that training posts are test posts too."""
    small = ToyConfig(num_demonstrations=300, num_pairs=300, num_test=8, num_values=2, num_attempts=1, num_fillers=0)
    corpus = load_corpus(DataConfig(toy=small, validation_fraction=0.2))
    tests = {row.prompt for row in toy.preferences(small, test=True)}
    assert not tests & (prompts(corpus.pairs) | prompts(corpus.demonstrations) | set(corpus.prompts))
    assert corpus.pairs == [row for row in toy.preferences(small, test=False) if row.prompt not in tests]
    assert [(r.read - r.kept, r.dropped[TESTED]) for r in corpus.reports] == [
        (300 - len(corpus.pairs),) * 2, (0, 0), (300 - len(corpus.demonstrations),) * 2
    ]  # fmt: skip
    assert len(corpus.pairs) < 300 and len(set(corpus.prompts)) < len(corpus.prompts) == len(corpus.pairs)
    assert corpus.validation and not prompts(corpus.validation) & prompts(corpus.reward_pairs)


def test_an_empty_set_says_what_was_read_and_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}] * 3)
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(kind="pairs", path=path))
    message = str(caught.value)
    assert "no demonstrations, pairs. " in message
    assert f"{path}: 3 rows read, 0 kept, 3 dropped: chosen equals rejected. Check the files" in message
    with pytest.raises(UserError, match=r"rows with a prompt of their own are data\.kind=pairs"):
        load_corpus(DataConfig(kind="hh", path=write(tmp_path / "b.jsonl", pairs(0, 9))))


def test_a_file_that_is_named_twice_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(0, 9))
    (tmp_path / "link.jsonl").symlink_to(path)
    for named, said in (((path,), []), ((path, str(tmp_path / "link.jsonl")), [f"data.path names {path} 2 times"])):
        with collect_warnings() as found:
            load_corpus(DataConfig(kind="pairs", path=named, validation_fraction=0.3))
        assert [warning.partition(":")[0] for warning in found if "times" in warning] == said


def test_a_template_that_writes_no_tools_is_what_to_change():
    report = DataReport("a.jsonl", 2, 0, Counter({"tools left out by the chat template": 2}))
    assert "name one that does, text.chat_template=FILE" in _advice([report], "pairs")


def test_the_fingerprint_of_files_is_of_their_content_and_the_options(tmp_path):
    a, b = write(tmp_path / "a.jsonl", pairs(0, 9)), write(tmp_path / "b.jsonl", pairs(0, 9))
    other = write(tmp_path / "c.jsonl", pairs(0, 10))
    config = DataConfig(kind="pairs", path=a)

    def changed(**values):
        return fingerprint(config.model_copy(update=values))

    same = {fingerprint(config), changed(path=(b,)), changed(toy=TOY)}
    assert len(same) == 1
    variants = [
        changed(path=(other,)), changed(path=(a, b)), changed(sft_path=(a,)), changed(test_path=(a,)),
        changed(prompt_path=(a,)), changed(kind="hh"), changed(filter="none"), changed(validation_fraction=0.1),
        changed(max_rows=3), changed(keep_news=True), changed(path=(a,), sft_path=(b,), test_path=(b,)),
        fingerprint(DataConfig()),
    ]  # fmt: skip
    assert len({*variants, *same}) == len(variants) + 1


def test_the_fingerprint_of_folders_and_of_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    a, b = write(folder / "a.jsonl", pairs(0, 9)), write(folder / "b.jsonl", pairs(9, 18))

    def of(*specs):
        return fingerprint(DataConfig(kind="pairs", path=specs))

    assert of(str(folder)) == of(a, b) != of(b, a)
    before = of(str(folder))
    write(folder / "b.jsonl", pairs(9, 19))
    assert of(str(folder)) != before

    class Loaded:
        cache_files = ({"filename": a},)

    monkeypatch.setattr("mpo_jax.data.sources._load_hub", lambda *_: Loaded())
    of_hub = of("hub:org/name")
    assert len({of_hub, of("hub:org/name::test"), of("hub:org/other"), of(a)}) == 4
    Loaded.cache_files = ({"filename": b},)
    assert of("hub:org/name") != of_hub


def test_the_fingerprint_of_the_toy_world_is_of_its_settings():
    assert fingerprint(DataConfig(toy=TOY)) == fingerprint(DataConfig(toy=TOY, max_rows=3))
    for name, value in {"seed": 1, "num_pairs": 41, "label_temperature": 0.5}.items():
        assert fingerprint(DataConfig(toy=TOY.model_copy(update={name: value}))) != fingerprint(DataConfig(toy=TOY))


def test_the_base_tokenizer_is_the_models_or_the_toy_worlds(shared_data):
    assert base_tokenizer(Config()).get_vocab() == toy.make_tokenizer().get_vocab()
    folder = str(shared_data / "models" / "stories260K")
    assert len(base_tokenizer(Config(model=ModelConfig(path=folder)))) == 512
    with pytest.raises(UserError, match=r"data\.kind=hh needs model\.path"):
        base_tokenizer(Config(data=DataConfig(kind="hh", path=("a.jsonl",))))
