"""mpo_jax.data.tldr: every published layout gives the same queries and summaries, and says what it leaves out."""

import json

import pytest

from mpo_jax.data import toy
from mpo_jax.data.chat import Chat
from mpo_jax.data.records import Demonstration, Preference, Prompt
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import open_source
from mpo_jax.data.tldr import has_references, read_tldr_demonstrations, read_tldr_preferences, read_tldr_prompts
from mpo_jax.errors import UserError

QUERY = "SUBREDDIT: r/work\n\nTITLE: My boss\n\nPOST: Lost {keys}.\n\n He yells.\n\nTL;DR:"
BODY = {"subreddit": "work", "title": "My boss", "post": "Lost {keys}.\n\n He yells."}
POST = {"id": "t3_1", **BODY, "summary": "boss lost keys"}
GROUP = "SUBREDDIT: r/work TITLE: My boss POST: Lost {keys}. He yells."
NEWS_QUERY = "Article:\nIt rained.\n\nTL;DR:"
NEWS_GROUP = "Article: It rained."


def refuse():
    raise AssertionError("these rows need no chat template")


def make_chat():
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}<assistant>"
    return Chat(tokenizer)


PLAIN = Renderer(refuse)


def source_of(tmp_path, *rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(path))


def comparison(first, second, choice, **info):
    return {
        "info": {"id": "t3_1", **BODY, "article": None, "site": None, **info},
        "summaries": [{"text": first, "policy": "x", "note": None}, {"text": second, "policy": "y", "note": None}],
        "choice": choice,
        "worker": "w",
    }


NEWS = comparison(" a", " b", 0, id="9f", subreddit=None, title=None, post=None, article="It rained.", site="cnn")


def referenced(reference, model, preferred):
    return {"prompt": QUERY, "reference": reference, "model_1b": model, "preferred": preferred}


def pair(chosen, rejected, prompt=QUERY):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# the real file


def test_real_rows_have_their_counts(shared_data):
    source = open_source(str(shared_data / "tldr" / "tldr_1945.sft_and_pairs.jsonl.gz"))
    raw = [row for _, row in source.rows()]
    groups = [" ".join(row["prompt"].removesuffix("TL;DR:").split()) for row in raw]
    subreddits = [row["prompt"].splitlines()[0].removeprefix("SUBREDDIT: ") for row in raw]
    rows, report = read_tldr_demonstrations(source, render=PLAIN)
    assert (report.read, report.kept, dict(report.dropped)) == (1945, 1945, {})
    assert rows == [Demonstration(row["prompt"], " " + row["reference"], group, category)
                    for row, group, category in zip(raw, groups, subreddits, strict=True)]  # fmt: skip
    rows, report = read_tldr_preferences(source, render=PLAIN)
    assert (report.read, report.kept, dict(report.dropped)) == (1945, 1000, {"no preference": 945})
    labelled = [row for row in raw if row["preferred"]]
    assert [row.chosen for row in rows] == [" " + row[row["preferred"]] for row in labelled]
    assert all({p.chosen, p.rejected} == {" " + row["reference"], " " + row["model_1b"]}
               for p, row in zip(rows, labelled, strict=True))  # fmt: skip
    prompts, report = read_tldr_prompts(source, render=PLAIN)
    assert [p.prompt for p in prompts] == [row["prompt"] for row in raw] and report.kept == 1945
    assert [p.group for p in prompts] == groups
    assert all(p.prompt.startswith("SUBREDDIT: r/") and p.prompt.endswith("\n\nTL;DR:") for p in prompts)
    assert has_references(source)


# layouts


@pytest.mark.parametrize(
    "row",
    [
        POST,
        {**POST, "id": 7},
        {name: POST[name] for name in POST if name != "id"},
        {**POST, "id": None},
        {"prompt": QUERY, "label": "boss lost keys"},
        {"prompt": QUERY, "completion": " boss lost keys"},
        {"prompt": QUERY, "response": "\n  boss lost keys"},
        referenced("boss lost keys", "x", None),
        referenced("boss lost keys", "x", "model_1b"),
    ],
)
def test_demonstrations_of_every_layout(tmp_path, row):
    rows, _ = read_tldr_demonstrations(source_of(tmp_path, row), render=PLAIN)
    assert rows == [Demonstration(QUERY, " boss lost keys", GROUP, "r/work")]


@pytest.mark.parametrize(
    "row",
    [
        comparison(" good", " bad", 0),
        comparison("bad", "\n  good", 1),
        comparison("good", "bad", 0, id=None),
        comparison("good", "bad", 0, article="ignored"),
        referenced("good", "bad", "reference"),
        referenced("bad", "good", "model_1b"),
        pair("good", " bad"),
    ],
)
def test_preferences_of_every_layout(tmp_path, row):
    rows, _ = read_tldr_preferences(source_of(tmp_path, row), render=PLAIN)
    assert rows == [Preference(QUERY, " good", " bad", GROUP, "r/work")]


@pytest.mark.parametrize("row", [POST, BODY, comparison("a", "a", 0), referenced("", "", None), pair("", ""),
                                 {"prompt": QUERY}, {"prompt": QUERY, "label": ""}])  # fmt: skip
def test_prompts_of_every_layout(tmp_path, row):
    assert read_tldr_prompts(source_of(tmp_path, row), render=PLAIN)[0] == [Prompt(QUERY, GROUP, "r/work")]


def test_an_end_at_the_summaries_start_belongs_to_the_query(tmp_path):
    query = "SUBREDDIT: r/work\nTITLE: x\nPOST: y"
    source = source_of(
        tmp_path,
        pair("TL;DR:  good", "\nTL;DR: bad", query),
        pair("TL;DR: good", "TL;DR: bad"),  # the query has its own
        pair("TL;DR: good", "bad", query),
    )
    rows, _ = read_tldr_preferences(source, render=PLAIN)
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [
        (f"{query}\nTL;DR:", " good", " bad"), (QUERY, " TL;DR: good", " TL;DR: bad"), (query, " TL;DR: good", " bad"),
    ]  # fmt: skip
    found = read_tldr_prompts(source, render=PLAIN)[0]
    assert [row.prompt for row in found] == [f"{query}\nTL;DR:", QUERY, query]
    assert found[0].group == found[2].group == rows[0].group == "SUBREDDIT: r/work TITLE: x POST: y"


def test_only_rows_with_an_authors_summary_have_references(tmp_path):
    assert has_references(source_of(tmp_path, referenced("a", "b", None)))
    for row in (POST, comparison("a", "b", 0), pair("a", "b")):
        assert not has_references(source_of(tmp_path, row))
    assert not has_references(source_of(tmp_path))


def test_as_a_chat_the_query_is_a_user_turn(tmp_path):
    source, render = source_of(tmp_path, comparison(" good", " bad", 0)), Renderer(make_chat, wrap=True)
    rows, _ = read_tldr_preferences(source, render=render)
    assert rows == [Preference(f"<user>{QUERY}<eos><assistant>", "good", "bad", GROUP, "r/work")]


# what is left out


def test_news_are_left_out_unless_kept(tmp_path):
    empty_post = comparison("a", "b", 1, id="8e", post="", article="It rained.")
    source = source_of(tmp_path, comparison("a", "b", 0), NEWS, empty_post)
    rows, report = read_tldr_preferences(source, strict=False, render=PLAIN)
    assert [row.prompt for row in rows] == [QUERY] and dict(report.dropped) == {"news article": 2}
    rows, report = read_tldr_preferences(source, render=PLAIN, keep_news=True)
    news = [Preference(NEWS_QUERY, " a", " b", NEWS_GROUP), Preference(NEWS_QUERY, " b", " a", NEWS_GROUP)]
    assert rows[1:] == news and report.kept == 3
    assert read_tldr_prompts(source, render=PLAIN)[1].dropped == {"news article": 2}
    found = read_tldr_prompts(source, render=PLAIN, keep_news=True)[0]
    assert [row.prompt for row in found] == [QUERY, NEWS_QUERY, NEWS_QUERY]


def test_equal_and_empty_summaries_are_left_out_unless_nothing_is_filtered(tmp_path):
    source = source_of(
        tmp_path, comparison(" a", "a", 1), comparison("a", " \n", 0), pair("", "b"), pair("a", "b"),
        pair("a", "b", ""), referenced("a", "b", None),
    )  # fmt: skip
    rows, report = read_tldr_preferences(source, render=PLAIN)
    dropped = {"chosen equals rejected": 1, "empty response": 2, "empty prompt": 1, "no preference": 1}
    assert (len(rows), report.read, report.kept, dict(report.dropped)) == (1, 6, 1, dropped)
    rows, report = read_tldr_preferences(source, strict=False, render=PLAIN)
    assert (len(rows), dict(report.dropped)) == (4, {"empty prompt": 1, "no preference": 1})
    source = source_of(tmp_path, POST, {**POST, "summary": " "})
    assert read_tldr_demonstrations(source, render=PLAIN)[1].dropped == {"empty response": 1}
    assert read_tldr_demonstrations(source, strict=False, render=PLAIN)[1].kept == 2
    assert read_tldr_demonstrations(source, max_rows=1, render=PLAIN)[1].read == 1


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_tldr_preferences, POST, r"unknown layout with the fields id, subreddit, title, post, summary; "
         r"known here: {info, summaries, choice}; {prompt, reference, model_1b, preferred}; {prompt, chosen, rej"),
        (read_tldr_preferences, {}, r"unknown layout with the fields \(none\)"),
        (read_tldr_demonstrations, comparison("a", "b", 0), "unknown layout with the fields info.* here: {subreddit"),
        (read_tldr_demonstrations, {"prompt": "p"}, "unknown layout .*{prompt, label}; {prompt, completion}"),
        (read_tldr_prompts, {"query": "p"}, r"unknown layout .* query; known here: .*{prompt}\."),
        (read_tldr_preferences, comparison("a", "b", 2), "field 'choice' must be 0 or 1, .*not 2"),
        (read_tldr_preferences, comparison("a", "b", True), "field 'choice' must be 0 or 1, .*not True"),
        (read_tldr_preferences, comparison("a", "b", None), "field 'choice' must be 0 or 1, .*not None"),
        (read_tldr_preferences, comparison("a", "b", 0) | {"summaries": [{"text": "a"}]}, "field 'summaries' must"),
        (read_tldr_preferences, comparison("a", 3, 0), "field 'summaries': field 'text' must be a string, not int"),
        (read_tldr_preferences, comparison("a", "b", 0) | {"info": "x"}, "field 'info' must be an object, not str"),
        (read_tldr_preferences, comparison("a", "b", 0, post=3), "field 'info': field 'post' must be a string"),
        (read_tldr_preferences, comparison("a", "b", 0, title=3), "field 'info': field 'title' must be a string"),
        (read_tldr_preferences, referenced("a", "b", "c"), "field 'preferred' must be reference, .*not 'c'"),
        (read_tldr_preferences, referenced("a", "b", ["c"]), "field 'preferred' must be reference"),
        (read_tldr_preferences, pair("a", 3), "field 'rejected' must be a string, not int"),
        (read_tldr_demonstrations, {**POST, "summary": 3}, "field 'summary' must be a string, not int"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_by_its_place(tmp_path, read, row, message):
    source = source_of(tmp_path, row)
    with pytest.raises(UserError, match=f"^{source.name}:1: {message}"):
        read(source, render=PLAIN)


@pytest.mark.parametrize(
    ("read", "row", "reason"),
    [
        (read_tldr_preferences, pair("a", None), "rejected is null"),
        (read_tldr_preferences, comparison("a", "b", 0, title=None), "title is null"),
        (read_tldr_demonstrations, {**POST, "summary": None}, "summary is null"),
        (read_tldr_prompts, {"prompt": None}, "prompt is null"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_rows_with_null_text_are_dropped_and_counted(tmp_path, read, row, reason, strict):
    rows, report = read(source_of(tmp_path, row), strict=strict, render=PLAIN)
    assert (rows, dict(report.dropped)) == ([], {reason: 1})
