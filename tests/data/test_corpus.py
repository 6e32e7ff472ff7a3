"""mpo_jax.data.corpus: from files or the toy world to disjoint sets, and a fingerprint of all that they depend on."""

import json

import pytest

from mpo_jax.config import Config, DataConfig, ModelConfig, ToyConfig
from mpo_jax.data import toy
from mpo_jax.data.corpus import base_tokenizer, fingerprint, load_corpus
from mpo_jax.data.records import is_validation
from mpo_jax.errors import UserError

TOY = ToyConfig(num_demonstrations=30, num_pairs=40, num_test=10)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


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


def test_all_rows_of_a_prompt_fall_on_one_side(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(0, 50, times=4))
    corpus = load_corpus(DataConfig(kind="pairs", path=path, validation_fraction=0.3))
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
    assert corpus.reports[-1].source == sft


def test_test_files_replace_the_validation_rows(tmp_path):
    path, test = write(tmp_path / "a.jsonl", pairs(0, 200)), write(tmp_path / "t.jsonl", pairs(500, 520))
    corpus = load_corpus(DataConfig(kind="pairs", path=path, test_path=test, validation_fraction=0.2))
    assert corpus.test_prompts == [f"prompt {i}" for i in range(500, 520)]
    assert not any(is_validation(row.group, seed=0, fraction=0.2) for row in corpus.pairs)
    everything = load_corpus(DataConfig(kind="pairs", path=path, test_path=test, validation_fraction=0.0))
    assert len(everything.pairs) == 200


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
    corpus = load_corpus(DataConfig(kind="hh", path=str(path)))
    assert len(corpus.pairs) + len(corpus.held_out) == 2299
    assert 74 <= len(corpus.held_out) <= 157  # 5% of 2299 within 4 standard deviations
    assert not prompts(corpus.pairs) & prompts(corpus.held_out)


def test_the_toy_world_brings_its_utility():
    corpus = load_corpus(DataConfig(toy=TOY))
    assert (len(corpus.demonstrations), len(corpus.pairs), len(corpus.held_out)) == (30, 40, 10)
    assert [report.kept for report in corpus.reports] == [30, 40, 10]
    assert corpus.utility is toy.utility
    assert (corpus.pairs, corpus.held_out) == (toy.preferences(TOY, test=False), toy.preferences(TOY, test=True))


def test_an_empty_set_says_what_was_read_and_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}] * 3)
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(kind="pairs", path=path))
    message = str(caught.value)
    assert "no demonstrations, pairs, held_out rows" in message
    assert f"{path}: read 3, kept 0, dropped {{'chosen equals rejected': 3}}" in message

    path = write(tmp_path / "b.jsonl", pairs(0, 20))
    with pytest.raises(UserError, match=r"no held_out rows.*raise data\.validation_fraction or name data\.test_path"):
        load_corpus(DataConfig(kind="pairs", path=path, validation_fraction=0.0))


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
        changed(kind="hh"), changed(filter="none"), changed(validation_fraction=0.1), changed(max_rows=3),
        fingerprint(DataConfig()),
    ]  # fmt: skip
    assert len({*variants, *same}) == len(variants) + 1


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
