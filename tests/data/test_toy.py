"""mpo_jax.data.toy: a lossless tokenizer, reproducible rows, a utility by hand and Bradley-Terry labels."""

import hashlib
import itertools

import numpy as np
import pytest

from mpo_jax.config.schema import ToyConfig
from mpo_jax.data import toy
from mpo_jax.data.toy import Post, utility

SMALL = ToyConfig(num_demonstrations=200, num_pairs=200, num_test=200)
LARGE = ToyConfig(num_values=16, num_attempts=4, num_fillers=3, num_demonstrations=300, num_pairs=300)
POST = Post(
    "r/work",
    [
        ("who", "my boss"),
        ("problem", "lost the keys"),
        ("attempt", "left a note"),
        ("attempt", "made a list"),
        ("question", "should i quit"),
    ],
    ["it rained today"],
)
PERFECT = " my boss, lost the keys, left a note, made a list, should i quit"


def texts(config: ToyConfig) -> list[str]:
    rows = toy.preferences(config, test=False) + toy.preferences(config, test=True)
    sides = [text for row in rows for text in (row.prompt, row.chosen, row.rejected)]
    return sides + [text for row in toy.demonstrations(config) for text in (row.prompt, row.response)]


def test_a_prompt_has_the_layout_of_tldr():
    assert POST.prompt() == (
        "SUBREDDIT: r/work\n\nTITLE: my boss\n\nPOST: my boss lost the keys. it rained today. i left a note. "
        "i made a list. should i quit?\n\nTL;DR:"
    )


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_the_tokenizer_is_lossless_on_everything_the_world_says(config):
    tokenizer = toy.make_tokenizer()
    for text in texts(config):
        ids = tokenizer(text).input_ids
        assert not {tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)
        assert tokenizer.decode(ids) == text


def test_prompt_and_response_join_as_ids():
    tokenizer = toy.make_tokenizer()
    for row in toy.demonstrations(SMALL):
        assert row.response.startswith(" ") and row.response.strip()
        joined = tokenizer(row.prompt).input_ids + tokenizer(row.response).input_ids
        assert joined == tokenizer(row.prompt + row.response).input_ids


def test_the_special_tokens_are_three_and_no_bos():
    tokenizer = toy.make_tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.bos_token_id is None
    assert tokenizer("nonsense").input_ids == [tokenizer.unk_token_id]
    assert toy.make_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_facts_are_told_apart():
    phrases = [value for values in toy.FACTS.values() for value in values]
    assert len(set(phrases)) == len(phrases) == 4 * 16
    for phrase in phrases:
        assert utility(f"POST: i {phrase}. TL;DR:", f" {phrase}") > 0
        assert utility("POST: i. TL;DR:", f" {phrase}") < 0
    for phrase in (*toy.FILLERS, *toy.RAMBLES):
        assert utility(f"POST: {phrase} TL;DR:", f" {phrase}") <= 0


def test_rows_are_those_of_the_seed():
    assert texts(SMALL) == texts(SMALL)
    other = SMALL.model_copy(update={"seed": 1})
    assert not set(texts(SMALL)[::3]) & {row.prompt + row.chosen for row in toy.preferences(other, test=False)}
    assert [r.prompt for r in toy.preferences(SMALL, test=False)] != [
        r.prompt for r in toy.preferences(other, test=False)
    ]


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        (SMALL, "95213f0ddc6511f1663cf380c71152cacca677a6aeb0cbebc4125e75ac78bdad"),
        (LARGE, "92b556786bdef911109403b99eac17782766e13aef2feed43e2714fb0453cbb5"),
    ],
)
def test_the_world_stays_as_it_is(config, digest):
    """Artifacts are named by the world's settings and not by its rows, so other rows would not show in a name."""
    rows = (*toy.demonstrations(config), *toy.preferences(config, test=False), *toy.preferences(config, test=True))
    # the fields that rows had when the digests were taken; toy rows bring no scores
    shown = [repr(row).replace(", scores=None)", ")") for row in rows]
    assert hashlib.sha256("\n".join(shown).encode()).hexdigest() == digest


def test_test_rows_demonstrations_and_pairs_come_from_streams_of_their_own():
    """Changing how many rows one set has leaves the others as they were, and no set repeats another's posts."""
    train, test = toy.preferences(SMALL, test=False), toy.preferences(SMALL, test=True)
    more = SMALL.model_copy(update={"num_pairs": 300, "num_demonstrations": 1})
    assert toy.preferences(more, test=False)[:200] == train
    assert toy.preferences(more, test=True) == test
    first = [[row.prompt for row in rows[:20]] for rows in (train, test, toy.demonstrations(SMALL))]
    assert not set(first[0]) & set(first[1]) and not set(first[0]) & set(first[2]) and not set(first[1]) & set(first[2])
    assert (len(train), len(test), len(toy.demonstrations(SMALL))) == (200, 200, 200)


def test_a_pair_has_two_sides_and_the_group_is_the_prompt():
    for row in toy.preferences(SMALL, test=False):
        assert row.chosen != row.rejected
        assert row.group == row.prompt


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        (PERFECT, 1.0 + 1.5 + 0.5 + 0.5 + 1.0),
        (" my boss", 1.0),
        (" lost the keys", 1.5),
        (" left a note", 0.5),
        (" should i quit", 1.0),
        (" should i quit, my boss", 2.0),  # any order
        (" my sister", -1.0),  # invented
        (" my boss, broke the car", 0.0),
        (" my boss, my boss", 0.5),  # repeated
        (" my boss, my boss, my boss", 0.0),
        (" my sister, my sister", -1.5),  # invented and repeated
        (" long story short", -0.3),  # rambling, three words
        (" long story short, my boss", 0.7),
        (" you know how it is", -0.5),
        (" bosses quit", -0.2),  # words of facts are no facts
        (" my bossy", -0.2),
        (" it rained today", -0.3),
        (PERFECT + ", my sister, my boss, anyway here we are", 4.5 - 1.0 - 0.5 - 0.4),
    ],
)
def test_utility_by_hand(response, expected):
    assert utility(POST.prompt(), response) == pytest.approx(expected, abs=1e-12)


def test_only_the_body_of_a_post_states_facts():
    prompt = "SUBREDDIT: r/work\n\nTITLE: my boss\n\nPOST: lost the keys\n\nTL;DR:"
    assert utility(prompt, " my boss") == -1.0
    assert utility(prompt, " lost the keys") == 1.5


def test_the_best_utility_is_reached_and_never_passed():
    assert utility(POST.prompt(), PERFECT) == 4.5
    for config, best in ((SMALL, 4.5), (LARGE, 5.5)):
        for row in toy.preferences(config, test=False):
            assert max(utility(row.prompt, row.chosen), utility(row.prompt, row.rejected)) <= best


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_labels_follow_bradley_terry(temperature):
    """In every bin of |gap|, as many labels prefer the better side as the sigmoid says, within 4 standard errors."""
    config = ToyConfig(num_pairs=6000, label_temperature=temperature, seed=1)
    rows = toy.preferences(config, test=False)
    gap = np.array([utility(row.prompt, row.chosen) - utility(row.prompt, row.rejected) for row in rows])
    right, size = gap > 0, np.abs(gap)
    expected = 1 / (1 + np.exp(-size / temperature))
    edges = [0.05, 0.55, 1.05, 1.55, 2.05, 3.05, 10.0]  # between the values, which are multiples of 0.1
    accuracies = []
    for low, high in itertools.pairwise(edges):
        inside = (size >= low) & (size < high)
        assert inside.sum() > 200
        error = np.sqrt((expected[inside] * (1 - expected[inside])).sum()) / inside.sum()
        accuracies.append(right[inside].mean())
        assert abs(accuracies[-1] - expected[inside].mean()) < 4 * error, (low, high)
    assert accuracies[-1] > accuracies[0] + 0.1
