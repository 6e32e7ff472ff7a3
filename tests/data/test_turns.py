"""mpo_jax.data.turns: conversations leave as turns and tools, and read again they are the same token ids."""

import json
from typing import Any, cast

import numpy as np
import pytest
import tokenizers
import transformers

import mpo_jax as mpo
from mpo_jax.config.schema import SelectConfig
from mpo_jax.data.chat import Chat, Message
from mpo_jax.data.pair_table import PairTable
from mpo_jax.data.turns import Turns
from mpo_jax.tools.selected import EASY, HARD, HARD_PROMPTS, export_selection
from tests.data.test_chat import CHATML, NO_SYSTEM, SPACED
from tests.data.test_layouts import ASK, RESULT, SCHEMA, TOOLS, WITH_TOOLS
from tests.data.test_records import reply, user

SYSTEM: Any = {"role": "system", "content": "Be brief. "}
PAIR = {"prompt": [SYSTEM, user(" is it sunny?\n")], "chosen": [reply('Yes, "it" is.')], "rejected": [reply("é\n")]}
LONGER = {
    "chosen": [user("hi"), reply("hello"), user("rome?"), reply(" sun")],
    "rejected": [user("hi"), reply("hello"), user("rome?"), reply("rain ")],
}
PLAIN = {"prompt": "rome?", "chosen": " sun", "rejected": " rain"}
CALLED = {"prompt": [user("sun?")], "chosen": [ASK], "rejected": [reply("No idea.")], "tools": TOOLS}
ANSWERED = {
    "prompt": [SYSTEM, user("sun?"), ASK, RESULT],
    "chosen": [reply("Yes.")],
    "rejected": [{**ASK, "content": "Again:"}],
    "tools": json.dumps(TOOLS),
}
SHARED = {
    "conversations": [{"from": "human", "value": "why?"}],
    "system": "s",
    "chosen": {"from": "gpt", "value": "so"},
    "rejected": {"from": "gpt", "value": "no"},
}


def byte_tokenizer(template: str) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, and BOS and EOS."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>")
    tokenizer.chat_template = template
    return tokenizer


def ids(pairs):
    return [(list(e.prompt), [list(r) for r in e.responses]) for e in pairs.examples]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("template", "rows", "options"),
    [
        (WITH_TOOLS, [PAIR, LONGER, CALLED, ANSWERED, SHARED], {}),
        (CHATML, [PAIR, LONGER, SHARED], {}),
        (CHATML.replace("{{ eos_token }}\n", "<|end|>\n{{ eos_token }}"), [PAIR, LONGER], {}),
        ("{{ bos_token }}" + SPACED, [LONGER], {}),
        (NO_SYSTEM, [PAIR, LONGER, SHARED], {"fold_system": True}),
        (CHATML, [PLAIN], {"chat": True}),
        (CHATML, [PLAIN], {}),
    ],
)
def test_exported_pairs_read_again_have_the_same_token_ids(template, rows, options, tmp_path):
    tokenizer = byte_tokenizer(template)
    pairs = mpo.read_pairs(rows, tokenizer, **options)
    assert len(pairs) == len(rows)
    pairs.take(np.arange(len(rows))[::-1]).to_jsonl(tmp_path / "out.jsonl")
    again = mpo.read_pairs(tmp_path / "out.jsonl", tokenizer, **options)
    assert ids(again) == ids(pairs)[::-1] and again.prompts == pairs.prompts[::-1]
    again.to_jsonl(tmp_path / "again.jsonl")
    assert lines(tmp_path / "again.jsonl") == lines(tmp_path / "out.jsonl")


def test_turns_calls_and_tools_are_those_of_the_rows(tmp_path):
    pairs = mpo.read_pairs([PAIR, CALLED, ANSWERED, SHARED, PLAIN], byte_tokenizer(WITH_TOOLS))
    pairs.to_jsonl(tmp_path / "out.jsonl")
    asked = {**ASK, "content": ""}
    answered = {**ANSWERED, "tools": [SCHEMA], "prompt": [SYSTEM, user("sun?"), asked, RESULT]}
    shared = {"prompt": [{"role": "system", "content": "s"}, user("why?")], "chosen": [reply("so")]}
    assert lines(tmp_path / "out.jsonl") == [
        PAIR,
        {**CALLED, "chosen": [asked], "tools": [SCHEMA]},
        answered,
        {**shared, "rejected": [reply("no")]},
        PLAIN,
    ]


def test_what_the_template_writes_around_a_reply_is_not_the_replys(tmp_path):
    pairs = mpo.read_pairs([LONGER], byte_tokenizer(SPACED))
    assert pairs.responses == [(" sun ", " rain ")]
    pairs.to_jsonl(tmp_path / "out.jsonl")
    (row,) = lines(tmp_path / "out.jsonl")
    assert (row["chosen"], row["rejected"]) == ([reply("sun")], [reply("rain")])


def test_a_reply_that_closes_an_opened_tag_stays_whole():
    opens = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    turns: Any = (user("a"),)
    made = Turns({"p": turns}, lambda: Chat(byte_tokenizer(opens)))
    assert made.row("p", {"chosen": "so</think>b"}) == {"prompt": [user("a")], "chosen": [reply("so</think>b")]}


def test_sampled_responses_are_one_message_each(tmp_path):
    """A table as the stage leaves it: of conversations, and of a plain prompt, whose text stays as it is."""
    tokenizer = byte_tokenizer(WITH_TOOLS)
    chat, turns = Chat(tokenizer), (cast(Message, {**SYSTEM, "tools": [SCHEMA]}), cast(Message, user("sun?")))
    prompts, texts = [chat.prompt(turns), "rome?"], [("call it", "Yes"), (" sun", " rain")]
    score = np.asarray([[0.0, 2.0], [1.0, 0.5]], np.float32)
    none = [(np.zeros(1, np.int32), np.zeros(1, np.int32))] * 2
    table = PairTable(prompts, texts, none, score, np.asarray([1, 0]), np.asarray([2.0, 0.5], np.float32), score)
    table.write(tmp_path)
    found = Turns({prompts[0]: turns}, lambda: chat)
    counts = export_selection(tmp_path, SelectConfig(threshold=1.0), found, tmp_path / "out")
    assert counts == {EASY: 1, HARD: 1, HARD_PROMPTS: 1}
    (easy,), (hard,) = lines(tmp_path / "out" / EASY), lines(tmp_path / "out" / HARD)
    asked = {"prompt": [SYSTEM, user("sun?")], "tools": [SCHEMA]}
    scores = {"gap": 2.0, "score_chosen": 2.0, "score_rejected": 0.0}
    assert easy == {**asked, "chosen": [reply("Yes")], "rejected": [reply("call it")], **scores}
    assert {key: hard[key] for key in PLAIN} == PLAIN
    assert lines(tmp_path / "out" / HARD_PROMPTS) == [{"prompt": "rome?"}]
    export_selection(tmp_path, SelectConfig(threshold=3.0), found, tmp_path / "out")
    assert lines(tmp_path / "out" / HARD_PROMPTS) == [asked, {"prompt": "rome?"}]
