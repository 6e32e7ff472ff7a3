"""mpo_jax.data.hh: dialogues as text and as chats, every reason to drop one, and the counts of the real files."""

import json

import pytest

from mpo_jax.data import toy
from mpo_jax.data.chat import Chat
from mpo_jax.data.hh import dialogue_turns, read_hh, read_hh_prompts
from mpo_jax.data.records import Preference, Prompt
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import open_source
from mpo_jax.errors import UserError

H, A = "\n\nHuman:", "\n\nAssistant:"
PROMPT = f"{H} hi{A} hello{H} why?{A}"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_chat():
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer)


def refuse():
    raise AssertionError("these rows need no chat template")


GROUP = json.dumps([["user", "hi"], ["assistant", "hello"], ["user", "why?"]])
PLAIN, WRAP = Renderer(refuse, turns=dialogue_turns), Renderer(make_chat, wrap=True, turns=dialogue_turns)


def source_of(tmp_path, *rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(path))


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("name", "read", "distinct", "strict"),
    [("helpful-base", 2354, 2352, 2333), ("harmless-base", 2312, 2312, 2299)],
)
def test_real_hh_has_the_papers_row_counts(shared_data, name, read, distinct, strict):
    source = open_source(str(shared_data / "hh-rlhf" / f"{name}.test.jsonl.gz"))
    rows, report = read_hh(source, strict=False, render=PLAIN)
    assert (report.read, report.kept, len(rows), report.dropped) == (read, read, read, {})
    raw = [row for _, row in source.rows()]
    assert sum(row["chosen"] != row["rejected"] for row in raw) == distinct
    assert [row.prompt + row.chosen for row in rows] == [row["chosen"] for row in raw]  # not a character is lost
    kept, report = read_hh(source, render=PLAIN)
    assert report.read == read and len(kept) == report.kept == strict == read - report.dropped.total()
    assert report.dropped["chosen equals rejected"] == read - distinct
    whole = {(row["chosen"], row["rejected"]) for row in raw}
    for row in kept:
        assert row.prompt.endswith(A) and row.group == PLAIN.group(row.prompt)
        assert row.category == name.removesuffix("-base")
        assert (row.prompt + row.chosen, row.prompt + row.rejected) in whole
    assert any("\n\n" in row.chosen for row in kept)


def test_real_hh_as_a_chat_is_the_same_rows(shared_data):
    source = open_source(str(shared_data / "hh-rlhf" / "harmless-base.test.jsonl.gz"))
    plain, _ = read_hh(source, max_rows=300, render=PLAIN)
    chats, _ = read_hh(source, max_rows=300, render=WRAP)
    assert [row.group for row in chats] == [row.group for row in plain]
    for row, chat in zip(plain, chats, strict=True):
        assert (chat.chosen, chat.rejected) == (row.chosen.strip(), row.rejected.strip())
        assert chat.prompt.count("<user>") == row.prompt.count(H)
        assert chat.prompt.count("<assistant>") == row.prompt.count(A) and chat.prompt.endswith("<eos><assistant>")


def test_hh_prompt_ends_at_the_last_assistant_turn(tmp_path):
    source = source_of(tmp_path, hh(PROMPT + " because", PROMPT + " no idea"))
    rows, report = read_hh(source, render=PLAIN)
    assert rows == [Preference(PROMPT, " because", " no idea", GROUP)]
    assert report.to_dict() == {"source": source.name, "read": 1, "kept": 1, "dropped": {}}


def test_blank_lines_inside_a_turn_stay(tmp_path):
    prompt = f"{H} one\n\ntwo\n\n\nthree{A}"
    source = source_of(tmp_path, hh(f"{prompt} x\n\ny\n", f"{prompt} \n\nz"))
    assert read_hh(source, render=PLAIN)[0] == [Preference(prompt, " x\n\ny\n", " \n\nz", "one two three")]
    asked = "<user>one\n\ntwo\n\n\nthree<eos><assistant>"
    assert read_hh(source, render=WRAP)[0] == [Preference(asked, "x\n\ny", "z", "one two three")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (PROMPT + " x", PROMPT + " x", "chosen equals rejected"),
        ("x", "y", "no assistant turn"),
        (f"{H} x", f"{H} y", "no assistant turn"),
        (PROMPT + " x", f"{H} hi{A} hello{H} when?{A} y", "rejected has another prompt"),
        (PROMPT + " x", f"{H} hi{A} y", "rejected has another prompt"),
        (PROMPT + " \n", PROMPT + " y", "empty response"),
        (PROMPT + " x", PROMPT, "empty response"),
        (f"{H} a{H} b{A} x", f"{H} a{H} b{A} y", "turns do not alternate"),
        (f"{H} a{A} b{A} x", f"{H} a{A} b{A} y", "turns do not alternate"),
        (f"{A} x", f"{A} y", "turns do not alternate"),
        (f"intro{H} a{A} x", f"intro{H} a{A} y", "turns do not alternate"),
        (PROMPT + " x", f"{PROMPT} y{H} more", "turns do not alternate"),
        (PROMPT + f" x{H} more", f"{PROMPT} y", "turns do not alternate"),
        (PROMPT + " x", f"{PROMPT} y{H} more{A} z", "turns do not alternate"),
    ],
)
@pytest.mark.parametrize("render", [PLAIN, WRAP])
def test_strict_drops_a_row_and_says_why(tmp_path, chosen, rejected, reason, render):
    good = hh(PROMPT + " good", PROMPT + " bad")
    source = source_of(tmp_path, good, hh(chosen, rejected), good)
    rows, report = read_hh(source, render=render)
    assert (len(rows), report.read, report.kept, dict(report.dropped)) == (2, 3, 2, {reason: 1})
    rows, report = read_hh(source, strict=False, render=PLAIN)
    assert (len(rows), report.read, report.kept, dict(report.dropped)) == (3, 3, 3, {})


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (PROMPT + " x", f"{H} other{A} y", (PROMPT, " x", " y")),
        (PROMPT + " x", "only words, no turn", (PROMPT, " x", "only words, no turn")),
        ("no turn", f"{H} a{A} y", ("", "no turn", f"{H} a{A} y")),
        (PROMPT + " x", PROMPT + " x", (PROMPT, " x", " x")),
    ],
)
def test_without_a_filter_every_row_is_kept_whole(tmp_path, chosen, rejected, expected):
    rows, _ = read_hh(source_of(tmp_path, hh(chosen, rejected)), strict=False, render=PLAIN)
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [expected]


def test_max_rows_counts_what_is_read_not_what_is_kept(tmp_path):
    source = source_of(tmp_path, hh(PROMPT + " x", PROMPT + " x"), *[hh(PROMPT + " x", PROMPT + " y")] * 3)
    rows, report = read_hh(source, max_rows=2, render=PLAIN)
    assert (len(rows), report.read, report.kept) == (1, 2, 1)


def test_a_broken_row_is_named_by_its_place(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:2: the row has no field 'rejected'; it has: chosen"):
        read_hh(source_of(tmp_path, hh(PROMPT + " x", PROMPT + " y"), {"chosen": PROMPT}), render=PLAIN)
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'chosen' must be a string, not list"):
        read_hh(source_of(tmp_path, hh([], PROMPT)), render=PLAIN)


# as a chat


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        (PROMPT, [turn("user", "hi"), turn("assistant", "hello"), turn("user", "why?")]),
        (f"{H}  a\n\nb\n{A}", [turn("user", "a\n\nb")]),
        (f"{H} say Assistant: or\nHuman: x{A}", [turn("user", "say Assistant: or\nHuman: x")]),
        (f"{H}{A}", [turn("user", "")]),
        (f"intro{H} a{A}", [turn("user", "intro"), turn("user", "a")]),
        (f"{H} a{A} b", [turn("user", "a"), turn("assistant", "b")]),
        (" plain\n", [turn("user", "plain")]),
        (A, []),
        ("", []),
    ],
)
def test_the_turns_of_a_dialogue(prompt, turns):
    assert dialogue_turns(prompt) == turns


def test_a_chat_has_the_turns_and_stripped_replies(tmp_path):
    source = source_of(tmp_path, hh(PROMPT + "  because\n", PROMPT + " no idea"))
    asked = "<user>hi<eos><assistant>hello<eos><user>why?<eos><assistant>"
    assert read_hh(source, render=WRAP)[0] == [Preference(asked, "because", "no idea", GROUP)]


def test_a_chat_needs_a_turn_before_the_reply(tmp_path):
    source = source_of(tmp_path, hh("no turn", "x"), hh(f"{A} x", f"{A} y"), hh(PROMPT + " x", PROMPT + " x"))
    rows, report = read_hh(source, strict=False, render=WRAP)
    assert len(rows) == 1 and dict(report.dropped) == {"empty prompt": 2}


def test_prompts_of_dialogues_and_of_prompt_rows(tmp_path):
    both = {**hh(f"{H} other{A} x", ""), "prompt": PROMPT}
    alone = [{"prompt": [turn("user", "hi")]}, {"prompt": " "}]
    source = source_of(tmp_path, hh(PROMPT + " x", "whatever"), both, *alone, hh("no turn", "x"))
    asked = ["<user>hi<eos><assistant>hello<eos><user>why?<eos><assistant>"] * 2 + ["<user>hi<eos><assistant>"]
    rows, report = read_hh_prompts(source, render=WRAP)
    assert [row.prompt for row in rows] == asked and (report.read, report.kept, dict(report.dropped)) == (
        5,
        3,
        {"empty prompt": 2},
    )
    assert read_hh_prompts(source, max_rows=2, render=PLAIN)[0] == [Prompt(PROMPT, GROUP)] * 2
    with pytest.raises(UserError, match=r"a\.jsonl:1: the row has no field 'prompt'; it has: text"):
        read_hh_prompts(source_of(tmp_path, {"text": "x"}), render=PLAIN)
