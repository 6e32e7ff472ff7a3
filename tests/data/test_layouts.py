"""mpo_jax.data.layouts and mpo_jax.data.fields: published layouts, forms of messages, tools, and text that is null."""

import copy
import json

import pytest

from mpo_jax.data import toy
from mpo_jax.data.chat import Chat
from mpo_jax.data.records import (
    Demonstration,
    Preference,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from mpo_jax.data.rendering import Renderer
from mpo_jax.errors import UserError
from tests.data.test_records import CHAT, PLAIN, pair, reply, source_of, user

ASKED = "<user>why?<eos><assistant>"


def read(reader, tmp_path, *rows, render=CHAT, **options):
    kept, report = reader(source_of(tmp_path, *rows), render=render, **options)
    return kept, dict(report.dropped)


def say(speaker, text):
    return {"from": speaker, "value": text}


# other layouts


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [say("human", "why?"), say("gpt", "so")]},
        {"conversations": [say("user", "why?"), say("chatgpt", "so")], "system": " "},
        {"conversations": [user("why?"), reply("so")], "id": 3},
        {"messages": [say("human", "why?"), say("GPT", "so")]},
        {"prompt": [say("human", "why?")], "completion": say("gpt", "so")},
    ],
)
def test_sharegpt_conversations_are_messages(tmp_path, row):
    assert read(read_demonstrations, tmp_path, row) == ([Demonstration(ASKED, "so", "why?")], {})
    assert [found.prompt for found in read(read_prompts, tmp_path, row)[0]] == [ASKED]


@pytest.mark.parametrize("turns", [[say("system", "s"), say("human", "why?")], [say("human", "why?")]])
def test_sharegpt_pairs_have_a_system_turn_once(tmp_path, turns):
    row = {"conversations": turns, "system": "s", "chosen": say("gpt", "so"), "rejected": say("gpt", "no")}
    group = json.dumps([["system", "s"], ["user", "why?"]])
    assert read(read_preferences, tmp_path, row)[0] == [Preference(f"<system>s<eos>{ASKED}", "so", "no", group)]
    assert [found.group for found in read(read_prompts, tmp_path, row)[0]] == [group]


def test_a_field_conversations_beside_the_known_ones_is_ignored(tmp_path):
    beside = {"conversations": [say("human", "x"), say("gpt", "y")]}
    assert read(read_preferences, tmp_path, pair("p", "a", "b") | beside, render=PLAIN)[0][0].prompt == "p"
    assert read(read_demonstrations, tmp_path, {"prompt": "p", "response": "a", **beside}, render=PLAIN)[0] == [
        Demonstration("p", "a", "p")
    ]


@pytest.mark.parametrize(("better", "chosen"), [(0, "a"), (1, "b"), ("1", "b")])
def test_the_better_of_two_numbered_responses_is_chosen(tmp_path, better, chosen):
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": better}
    rejected = "b" if chosen == "a" else "a"
    assert read(read_preferences, tmp_path, row, render=PLAIN)[0] == [Preference("p", chosen, rejected, "p")]
    assert read(read_prompts, tmp_path, row, render=PLAIN)[0][0].prompt == "p"
    null = {**row, "better_response_id": None}
    assert read(read_preferences, tmp_path, null, render=PLAIN) == ([], {"better_response_id is null": 1})


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("\n\nHuman: why?\n\nAssistant:", " It is so.", " It is not."),  # both responses begin alike
        ("Human: a\nAssistant: b\nHuman: why?\nAssistant:", " so", " no"),
        ("### Instruction:\nwhy?\n\n### Response:\n", "so", "no"),
        ("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n", "so\nit is", "so\nit was"),
        ("[INST] why? [/INST]", " so", " no"),
        ("Why is this?\n", "So it is", "So it was"),  # without a mark, the last line break
        ("\n\nHuman: why?\n\nAssistant:", " so", " so it is"),  # one side is the other's beginning
    ],
)
def test_without_a_prompt_it_is_what_both_sides_begin_with(tmp_path, prompt, chosen, rejected):
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    (found,), _ = read(read_preferences, tmp_path, row, render=PLAIN)
    assert (found.prompt, found.chosen, found.rejected) == (prompt, chosen, rejected)
    assert [one.prompt for one in read(read_prompts, tmp_path, row, render=PLAIN)[0]] == [prompt]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: b", "chosen equals rejected"),
        ("Human: a\n\nAssistant: b", "Human: c\n\nAssistant: b", "rejected has another prompt"),
        (
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "Human: a\n\nAssistant: e",
            "rejected has another prompt",
        ),
    ],
)
def test_dialogues_without_one_prompt_are_dropped(tmp_path, chosen, rejected, reason):
    assert read(read_preferences, tmp_path, {"chosen": chosen, "rejected": rejected}, render=PLAIN) == ([], {reason: 1})


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_preferences, {"chosen": "yes", "rejected": "no"}, r"share no beginning .* data\.columns\.prompt=NAME"),
        (read_preferences, {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2},
         "field 'better_response_id' must be 0 or 1, .* not 2"),
        (read_preferences, {"prompt": "p", "response_0": "a", "better_response_id": 0}, "has no field 'response_1'"),
        (read_demonstrations, {"conversations": [say("narrator", "x")]}, "'from' must be one of human, .*'narrator'"),
        (read_demonstrations, {"conversations": "x"}, "field 'conversations' must be a list of messages, not str"),
        (read_demonstrations, {"conversations": []}, "a conversation must end with"),
        (read_demonstrations, {"messages": [user([{"type": "text"}]), reply("a")]}, "part 1 .* no field 'text'"),
        (read_demonstrations, {"messages": [user([3]), reply("a")]}, "a part is an object {type, text}, not int"),
        (read_demonstrations, {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"x": 1}]}]},
         "a tool call is an object {function"),
        (read_demonstrations, {"messages": [user("a"), reply("b")], "tools": "{"}, "field 'tools': not valid JSON"),
        (read_demonstrations, {"messages": [user("a"), reply("b")], "tools": [3]}, "must be a list of JSON schemas"),
        (read_preferences, {"data": [pair("p", "a", "b")]}, "if 'data' holds the rows, write that list alone"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_by_its_place(tmp_path, reader, row, message):
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{message}"):
        read(reader, tmp_path, row)


# parts and nulls


def test_text_parts_are_joined_as_they_are(tmp_path):
    parts = [{"type": "text", "text": "wh", "image_url": None}, "y", {"type": "input_text", "text": "?"}]
    assert read(read_demonstrations, tmp_path, {"messages": [user(parts), reply("so")]})[0][0].prompt == ASKED
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    row = {"messages": [user(image), reply("so")]}
    for strict in (True, False):
        assert read(read_demonstrations, tmp_path, row, strict=strict) == ([], {"message part of type image_url": 1})


@pytest.mark.parametrize(
    ("reader", "row", "reason"),
    [
        (read_preferences, pair("p", None, "b"), "chosen is null"),
        (read_preferences, pair("p", "a", None), "rejected is null"),
        (read_preferences, pair(None, "a", "b"), "prompt is null"),
        (read_preferences, pair([user("a")], [reply(None)], [reply("b")]), "content is null"),
        (read_demonstrations, {"prompt": "p", "response": None}, "response is null"),
        (read_demonstrations, {"conversations": [say("human", None), say("gpt", "a")]}, "value is null"),
        (read_prompts, {"prompt": None}, "prompt is null"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_rows_with_null_text_are_dropped_and_counted(tmp_path, reader, row, reason, strict):
    good = {"prompt": "p", "chosen": "a", "rejected": "b", "response": "a"}
    kept, dropped = read(reader, tmp_path, row, good, strict=strict)
    assert (len(kept), dropped) == (1, {reason: 1})


# tools

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string", "x": None}}}}]
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASK = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"sun": "yes"}', "tool_call_id": "1"}
WITH_TOOLS = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
SHOWN_TOOLS = f"[tools {json.dumps([SCHEMA])}]"
CALLED = 'call weather {"city": "Rome"}'


def templated(template):
    def make():
        tokenizer = toy.make_tokenizer()
        tokenizer.chat_template = template.replace("<eos>", tokenizer.eos_token)
        return Chat(tokenizer)

    return Renderer(make)


def text(rendered):
    return rendered.replace("<eos>", str(toy.make_tokenizer().eos_token))


def test_tools_calls_and_results_go_through_the_chat_template(tmp_path):
    row = {"messages": [user("sun?"), ASK, RESULT, reply("Yes.")], "tools": TOOLS}
    (found,), dropped = read(read_demonstrations, tmp_path, row, render=templated(WITH_TOOLS))
    expected = f'{SHOWN_TOOLS}<user>sun?<eos><assistant>{CALLED}<eos><tool>{{"sun": "yes"}}<eos><assistant>'
    assert (found.prompt, found.response, dropped) == (text(expected), "Yes.", {})
    assert "Rome" in found.group  # another call is another prompt


def test_a_reply_may_be_a_tool_call(tmp_path):
    no = reply("No idea.")
    row = {"prompt": [user("sun?")], "chosen": [ASK], "rejected": [no], "tools": json.dumps(TOOLS)}
    conversations = {}
    render = templated(WITH_TOOLS)
    render = Renderer(render.chat, conversations=conversations)
    (found,), _ = read(read_preferences, tmp_path, row, render=render)
    prompt = text(f"{SHOWN_TOOLS}<user>sun?<eos><assistant>")
    assert found == Preference(prompt, CALLED, "No idea.", "sun?")
    assert conversations[prompt][0]["tools"] == [SCHEMA]  # a reward model that reads text gets them too
    same = {**row, "rejected": [copy.deepcopy(ASK)]}
    assert read(read_preferences, tmp_path, same, render=render) == ([], {"chosen equals rejected": 1})


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"tool_calls": json.dumps([{"name": "weather", "arguments": {"city": "Rome"}}]), "content": ""},
        {"function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}, "content": None},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    ],
)
def test_calls_are_read_in_every_form(tmp_path, call):
    last = call if "from" in call else {"role": "assistant", **call}
    row = {"conversations": [user("sun?"), last], "tools": TOOLS}
    (found,), _ = read(read_demonstrations, tmp_path, row, render=templated(WITH_TOOLS))
    assert found.response == CALLED


CALLS = "{% for c in m.tool_calls or [] %}call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("turns", "template", "reason"),
    [
        ([user("a"), reply("b")], WITH_TOOLS.replace("if tools", "if none"), "tools"),
        ([user("a"), ASK, RESULT, reply("b")], WITH_TOOLS.replace(CALLS, ""), "tool calls"),
        ([user("a"), ASK], WITH_TOOLS.replace(CALLS, ""), "tool calls"),
        ([user("a"), ASK, RESULT, reply("b")], WITH_TOOLS.replace("{{ m.content }}",
         "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"), "tool results"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_drops_the_row(tmp_path, turns, template, reason):
    row = {"messages": turns, "tools": TOOLS}
    expected = {f"{reason} left out by the chat template": 1}
    assert read(read_demonstrations, tmp_path, row, render=templated(template)) == ([], expected)


def test_a_call_written_with_special_tokens_drops_the_row(tmp_path):
    pad = str(toy.make_tokenizer().pad_token)
    template = WITH_TOOLS.replace("call {{", pad + "call {{")
    _, dropped = read(read_demonstrations, tmp_path, {"messages": [user("a"), ASK]}, render=templated(template))
    (reason,) = dropped
    assert reason.endswith(f"writes with the special token {pad}")
