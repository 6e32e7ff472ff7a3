"""mpo_jax.data.records: every kind of generic row and fault, strings and conversations, and the split."""

import json
import random
from collections import Counter

import pytest

from mpo_jax.data import toy
from mpo_jax.data.chat import Chat
from mpo_jax.data.records import (
    DataReport,
    Demonstration,
    Preference,
    Prompt,
    is_validation,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import open_source
from mpo_jax.errors import UserError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_chat():
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer)


def refuse():
    raise AssertionError("these rows need no chat template")


PLAIN, CHAT, WRAP = Renderer(refuse), Renderer(make_chat), Renderer(make_chat, wrap=True)


def source_of(tmp_path, *rows):
    """Rows as JSON lines; strings as they are."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return open_source(str(path))


def texts(rows):
    return [row.prompt for row in rows]


def user(content):
    return {"role": "user", "content": content}


def reply(content):
    return {"role": "assistant", "content": content}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "more": 1}


# plain rows


def test_preferences(tmp_path):
    rows = [
        pair("p\n\nq", " a", " b"),
        pair("p", "a", "a"),
        pair(" ", "a", "b"),
        pair("p", "", "b"),
        pair("p", "a", " "),
    ]
    source = source_of(tmp_path, *rows)
    kept, report = read_preferences(source, render=PLAIN)
    assert kept == [Preference("p\n\nq", " a", " b", "p q")]
    dropped = {"chosen equals rejected": 1, "empty prompt": 1, "empty response": 2}
    assert report == DataReport(source.name, 5, 1, report.dropped) and dict(report.dropped) == dropped
    assert report.to_dict() == {"source": source.name, "read": 5, "kept": 1, "dropped": dropped}


def test_without_a_filter_only_empty_prompts_go(tmp_path):
    rows = [pair("p", "a", "a"), pair("", "a", "b"), pair(" ", "a", "b"), pair("p", "", " ")]
    kept, report = read_preferences(source_of(tmp_path, *rows), strict=False, render=PLAIN)
    expected = [("p", "a", "a"), (" ", "a", "b"), ("p", "", " ")]
    assert [(row.prompt, row.chosen, row.rejected) for row in kept] == expected
    assert (report.kept, dict(report.dropped)) == (3, {"empty prompt": 1})
    rows = [{"prompt": "p", "response": ""}, {"prompt": "", "response": "a"}]
    kept, report = read_demonstrations(source_of(tmp_path, *rows), strict=False, render=PLAIN)
    assert kept == [Demonstration("p", "", "p")] and dict(report.dropped) == {"empty prompt": 1}


def test_demonstrations(tmp_path):
    good = [
        {"prompt": "p", "response": " a"},
        {"prompt": "p", "completion": " b"},
        {"prompt": "p", "response": " c", "completion": " d"},
        {"prompt": "p", "response": None, "completion": " e", "messages": None},  # columns that a row does not use
    ]
    empty = [{"prompt": "", "response": "a"}, {"prompt": "p", "completion": "\n"}]
    rows, report = read_demonstrations(source_of(tmp_path, *good, *empty), render=PLAIN)
    assert rows == [Demonstration("p", response, "p") for response in (" a", " b", " c", " e")]
    assert (report.read, report.kept, dict(report.dropped)) == (6, 4, {"empty prompt": 1, "empty response": 1})
    with pytest.raises(
        UserError, match=r":1: a demonstration has the fields prompt and .*; this row has: prompt, text"
    ):
        read_demonstrations(source_of(tmp_path, {"prompt": "p", "text": "x"}), render=PLAIN)


def test_prompts(tmp_path):
    source = source_of(tmp_path, {"prompt": " p\n"}, {"prompt": "\n"}, {"prompt": "q", "chosen": 3}, {"prompt": ""})
    assert read_prompts(source, render=PLAIN) == (
        [Prompt(" p\n", "p"), Prompt("q", "q")],
        DataReport(source.name, 4, 2, Counter({"empty prompt": 2})),
    )
    assert texts(read_prompts(source, strict=False, render=PLAIN)[0]) == [" p\n", "\n", "q"]


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (read_preferences, pair("p", "x", "x")),
        (read_demonstrations, {"prompt": "p", "response": ""}),
        (read_prompts, {"prompt": ""}),
    ],
)
def test_max_rows_counts_what_is_read_not_what_is_kept(tmp_path, read, row):
    good = {**pair("p", "x", "y"), "response": "x"}
    rows, report = read(source_of(tmp_path, row, good, good, "broken"), max_rows=2, render=PLAIN)
    assert (len(rows), report.read, report.kept) == (1, 2, 1)


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
FAULTS = {
    "missing field": ('{"prompt": "p", "chosen": "a"}', "the row has no field 'rejected'; it has: pr"),
    "empty object": ("{}", "the row has no field 'prompt'; it has: nothing"),
    "wrong type": (GOOD.replace('"b"', "3"), "field 'rejected' must be a string, not int"),
    "list": (GOOD.replace('"p"', "[3]"), "field 'prompt', message 1: a message is an object"),
    "half a character": (GOOD.replace('"b"', r'"\ud83d"'), "field 'rejected' holds half a surrogate"),
}


@pytest.mark.parametrize(("row", "message"), FAULTS.values(), ids=FAULTS)
def test_a_broken_row_is_named_by_its_place(tmp_path, row, message):
    with pytest.raises(UserError, match=f"^{tmp_path}/a.jsonl:3: {message}"):
        read_preferences(source_of(tmp_path, GOOD, "", row), render=PLAIN)


# conversations

SYSTEM = {"role": "system", "content": "s"}
TALK = [SYSTEM, user("hi"), reply("hello"), user("why?")]
TALK_TEXT = "<system>s<eos><user>hi<eos><assistant>hello<eos><user>why?<eos><assistant>"
TALK_GROUP = '[["system", "s"], ["user", "hi"], ["assistant", "hello"], ["user", "why?"]]'
ASK = [user("why?")]


@pytest.mark.parametrize(
    "row",
    [
        pair(TALK, [reply(" a")], [reply("b")]),
        pair(TALK, " a", "b"),
        pair(TALK, [reply(" a")], "b"),
        pair(TALK, [*TALK, reply(" a")], [*TALK, reply("b")]),
        pair(TALK[:1], [*TALK[1:], reply(" a")], [*TALK[1:], reply("b")]),
        pair(TALK[:2], [*TALK[2:], reply(" a")], [*TALK[2:], reply("b")]),
        pair("why?", [*TALK, reply(" a")], [*TALK, reply("b")]),
        pair(None, [*TALK, reply(" a")], [*TALK, reply("b")]),
        {"chosen": [*TALK, {**reply(" a"), "name": None}], "rejected": [*TALK, reply("b")]},
    ],
)
@pytest.mark.parametrize("render", [CHAT, WRAP])
def test_a_conversation_in_any_layout_is_one_row(tmp_path, row, render):
    rows, report = read_preferences(source_of(tmp_path, row), render=render)
    assert rows == [Preference(TALK_TEXT, " a", "b", TALK_GROUP)] and report.kept == 1


def test_a_plain_prompt_beside_replies_is_a_user_turn(tmp_path):
    rows, _ = read_preferences(source_of(tmp_path, pair("why?", [reply("a")], [reply("b")])), render=CHAT)
    assert rows == [Preference("<user>why?<eos><assistant>", "a", "b", "why?")]


@pytest.mark.parametrize(
    ("row", "reason", "kept"),
    [
        (pair(ASK, [reply("a")], [reply("a")]), "chosen equals rejected", ("a", "a")),
        (pair(ASK, [reply("")], [reply("a")]), "empty response", ("", "a")),
        (pair([user(" ")], [reply("a")], [reply("b")]), "empty prompt", ("a", "b")),
        (pair(ASK, [reply("a")], [user("why?"), reply("x"), user("so"), reply("b")]), "rejected has another prompt",
         ("a", "b")),
        (pair(None, [*ASK, reply("a")], [user("who?"), reply("a")]), "rejected has another prompt", ("a", "a")),
        (pair([], [reply("a")], [reply("b")]), "empty prompt", None),
    ],
)  # fmt: skip
def test_strict_drops_a_conversation_and_says_why(tmp_path, row, reason, kept):
    source = source_of(tmp_path, row)
    rows, report = read_preferences(source, render=CHAT)
    assert (rows, dict(report.dropped)) == ([], {reason: 1})
    rows, report = read_preferences(source, strict=False, render=CHAT)
    assert [(row.chosen, row.rejected) for row in rows] == ([kept] if kept else [])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*TALK, reply("a")]},
        {"prompt": "why?", "messages": [*TALK, reply("a")]},
        {"prompt": TALK, "response": [reply("a")]},
        {"prompt": TALK, "completion": "a"},
        {"prompt": TALK, "completion": [reply("a")], "messages": []},
    ],
)
def test_demonstrations_of_conversations(tmp_path, row):
    rows, _ = read_demonstrations(source_of(tmp_path, row), render=CHAT)
    assert rows == [Demonstration(TALK_TEXT, "a", TALK_GROUP)]


def test_prompts_of_conversations(tmp_path):
    source = source_of(tmp_path, {"prompt": TALK}, {"prompt": []}, {"prompt": "plain"})
    rows, report = read_prompts(source, render=CHAT)
    assert rows == [Prompt(TALK_TEXT, TALK_GROUP), Prompt("plain", "plain")] and dict(report.dropped) == {
        "empty prompt": 1
    }


def test_as_a_chat_plain_prompts_are_user_turns(tmp_path):
    """The space that joins plain text is no part of the reply; the group is the same with every model."""
    source = source_of(tmp_path, pair(" why?\n", "  a", "b "))
    asked = "<user> why?\n<eos><assistant>"
    assert read_preferences(source, render=WRAP)[0] == [Preference(asked, " a", "b ", "why?")]
    assert read_preferences(source, render=CHAT)[0] == [Preference(" why?\n", "  a", "b ", "why?")]
    assert read_prompts(source, render=WRAP)[0] == [Prompt(asked, "why?")]
    source = source_of(tmp_path, {"prompt": "why?", "response": " a"})
    assert read_demonstrations(source, render=WRAP)[0] == [Demonstration("<user>why?<eos><assistant>", "a", "why?")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(ASK, [{"content": "a"}], "b"), "field 'chosen', message 1: the row has no field 'role'; it has: content"),
        (pair(ASK, "a", [reply(3)]), "field 'rejected', message 1: field 'content' must be a string, not int"),
        (
            pair([SYSTEM, "why?"], "a", "b"),
            "field 'prompt', message 2: a message is an object {role, content}, not str",
        ),
        (pair(ASK, [reply("a"), user("b")], "b"), "field 'chosen': a conversation must end with .*, not with user"),
        (pair(ASK, "a", []), "field 'rejected': a conversation must end with .*assistant, not with nothing"),
        (pair(None, ASK, [*ASK, reply("b")]), "field 'chosen': a conversation must end with .*, not with user"),
        (pair([{"role": "tool", "content": "t"}], "a", "b"), "the tokenizer's chat template fails .*no tools here"),
        ({"chosen": "a", "rejected": [reply("b")]}, "the row has no field 'prompt'"),
    ],
)
def test_a_malformed_conversation_is_named_by_its_place(tmp_path, row, message):
    with pytest.raises(UserError, match=f"^{tmp_path}/a.jsonl:2: {message}"):
        read_preferences(source_of(tmp_path, GOOD, row), render=CHAT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": ASK}, "field 'messages': a conversation must end with .*assistant, not with user"),
        ({"messages": []}, "field 'messages': a conversation must end with .*assistant, not with nothing"),
        ({"response": [reply("a")]}, "the row has no field 'prompt'; it has: response"),
    ],
)
def test_a_malformed_demonstration_is_named_by_its_place(tmp_path, row, message):
    with pytest.raises(UserError, match=f"^{tmp_path}/a.jsonl:1: {message}"):
        read_demonstrations(source_of(tmp_path, row), render=CHAT)


def test_conversations_need_a_template_and_the_row_says_so(tmp_path):
    render = Renderer(lambda: Chat(toy.make_tokenizer()))
    with pytest.raises(UserError, match=r"a\.jsonl:2: the tokenizer has no chat template"):
        read_preferences(source_of(tmp_path, GOOD, pair(ASK, "a", "b")), render=render)
    assert len(read_preferences(source_of(tmp_path, GOOD), render=render)[0]) == 1


def test_rows_whose_system_turn_is_refused_are_dropped_and_counted_or_folded(tmp_path):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("tool", "system")
    asked = [{"role": "system", "content": "be kind"}, *ASK]
    source = source_of(tmp_path, pair(asked, "a", "b"), pair(ASK, "a", "b"))
    rows, report = read_preferences(source, render=Renderer(lambda: Chat(tokenizer)))
    assert (report.read, report.kept) == (2, 1)
    assert report.dropped == {"system turn refused by the chat template (text.fold_system=false)": 1}
    folded, report = read_preferences(source, render=Renderer(lambda: Chat(tokenizer, fold_system=True)))
    assert report.kept == 2 and not report.dropped and folded[1:] == rows
    assert folded[0].prompt == f"<user>be kind\n\n{ASK[0]['content']}<eos><assistant>"


# the split

GROUPS = [f"prompt {i}" for i in range(20000)]


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (0.05, 877, 1123), (0.5, 9717, 10283)])
def test_the_split_has_about_its_fraction(fraction, low, high):
    """Within 4 standard deviations of the binomial."""
    assert low <= sum(is_validation(group, seed=0, fraction=fraction) for group in GROUPS) <= high


def test_the_split_is_a_function_of_seed_and_group_alone():
    inside = {group for group in GROUPS[:2000] if is_validation(group, seed=0, fraction=0.05)}
    shuffled = random.Random(0).sample(GROUPS[:2000], 2000)
    assert {group for group in shuffled if is_validation(group, seed=0, fraction=0.05)} == inside
    assert inside <= {group for group in GROUPS[:2000] if is_validation(group, seed=0, fraction=0.1)}
    assert inside != {group for group in GROUPS[:2000] if is_validation(group, seed=1, fraction=0.05)}


@pytest.mark.parametrize(
    ("group", "remainder"),
    [("prompt 0", 9080), ("", 7940), ("\n\nHuman: ünïcode 漢字\n\nAssistant:", 6420)],
)
def test_the_split_is_the_documented_hash(group, remainder):
    """Remainders by `sha256sum`; a change would move rows of finished runs from training to validation."""
    assert not is_validation(group, seed=0, fraction=remainder / 10000)
    assert is_validation(group, seed=0, fraction=(remainder + 1) / 10000)


# turns that a template does not write

TWO_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}<{{ m.role }}>{{ m.content }}<eos>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rendering(template=TWO_ROLES, **options):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = template
    return Renderer(lambda: Chat(tokenizer, **options), ignored=Counter())


@pytest.mark.parametrize("role", ["human", "User", "USER", " user"])
def test_a_role_of_another_name_is_the_same_role(role, tmp_path):
    row = pair([{"role": role, "content": "hi"}], [{"role": "GPT", "content": "a"}], [reply("b")])
    (found,), _ = read_preferences(source_of(tmp_path, row), render=rendering())
    assert (found.prompt, found.chosen, found.group) == ("<user>hi<eos><assistant>", "a", "hi")


def test_an_unknown_role_is_read_by_a_template_that_writes_it(tmp_path):
    # the text stands in the rendering of another turn too
    source = source_of(tmp_path, pair([user("this"), {"role": "critic", "content": "hi"}], "a", "b"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: the tokenizer's chat template leaves out .* role 'critic'"):
        read_preferences(source, render=rendering())
    (found,), _ = read_preferences(source, render=rendering(TEMPLATE))
    assert "<critic>hi<eos>" in found.prompt


def test_a_system_turn_that_the_template_ignores_is_counted_or_folded(tmp_path):
    row = pair([{"role": "system", "content": "be kind"}, user("hi")], "a", "b")
    source, render = source_of(tmp_path, row, row), rendering()
    rows, _ = read_preferences(source, render=render)
    assert texts(rows) == ["<user>hi<eos><assistant>"] * 2
    (said,) = render.warnings()
    assert said.startswith("2 conversations have a system turn that the chat template leaves out: text.fold_system")
    folded = rendering(fold_system=True)
    rows, _ = read_preferences(source, render=folded)
    assert texts(rows) == ["<user>be kind\n\nhi<eos><assistant>"] * 2
    assert folded.warnings() == []


def test_a_turn_of_the_user_that_the_template_ignores_drops_the_row(tmp_path):
    last = "{{ messages[-1].content }}>"
    rows, report = read_prompts(source_of(tmp_path, {"prompt": [user("a"), user("b")]}), render=rendering(last))
    assert (rows, report.dropped) == ([], {"user turn left out by the chat template": 1})


def test_a_category_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'category' holds half a surrogate pair"):
        read_preferences(source_of(tmp_path, pair("p", "a", "b") | {"category": "\ud800"}), render=PLAIN)
