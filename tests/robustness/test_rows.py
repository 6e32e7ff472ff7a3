"""Rows as people have them: odd files and rows, each with the rows that come of it, the drops, or the message.

A case is (what it is, file name, content, what is expected). Content is bytes, text, or rows that become JSON lines.
Expected is a piece of an error's message, or a list of (prompt, chosen, rejected) for kept rows and strings for reasons
of drops.
"""

import gzip
import importlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_jax.config.registry import ROW_FORMATS
from mpo_jax.config.schema import DataConfig
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import open_source
from mpo_jax.errors import UserError
from tests.data.test_records import make_chat


def user(content):
    return {"role": "user", "content": content}


def bot(content):
    return {"role": "assistant", "content": content}


def row(**changes):
    return {"prompt": "p", "chosen": "a", "rejected": "b", **changes}


def line(**changes):
    return json.dumps(row(**changes))


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


KEPT = ("p", "a", "b")
TALK = ("<user>p<eos><assistant>", "a", "b")
HUMAN = "\n\nHuman: p\n\nAssistant:"
GOOD = line()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b"}
QUERY = "SUBREDDIT: r/a\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"

FILES = [
    ("empty", "a.jsonl", "", []),
    ("blank lines", "a.jsonl", "\n\n  \n", []),
    ("no end of line", "a.jsonl", GOOD, [KEPT]),
    ("Windows", "a.jsonl", f"{GOOD}\r\n{GOOD}\r\n", [KEPT, KEPT]),
    ("byte-order mark", "a.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), [KEPT]),
    ("UTF-16", "a.jsonl", GOOD.encode("utf-16"), "a.jsonl:1: not UTF-8 text"),
    ("Latin-1", "a.jsonl", line(chosen="é").replace("\\u00e9", "é").encode("latin-1"), "a.jsonl:1: not UTF-8 text"),
    ("NUL bytes", "a.jsonl", b"\0\0\0\n", "a.jsonl:1: broken JSON"),
    ("half a line", "a.jsonl", f"{GOOD}\n{GOOD[:20]}", "a.jsonl:2: broken JSON"),
    ("two objects in a line", "a.jsonl", f"{GOOD} {GOOD}", "a.jsonl:1: broken JSON: Extra data"),
    ("comma after a line", "a.jsonl", f"{GOOD},\n{GOOD}", "a.jsonl:1: broken JSON: Extra data"),
    ("single quotes", "a.jsonl", "{'prompt': 'p'}", "a.jsonl:1: broken JSON"),
    ("a comment", "a.jsonl", f"// rows\n{GOOD}", "a.jsonl:1: broken JSON"),
    ("a string for a row", "a.jsonl", '"text"', "must be a JSON object, not str"),
    ("a number for a row", "a.jsonl", "3", "must be a JSON object, not int"),
    ("null for a row", "a.jsonl", f"{GOOD}\nnull", "a.jsonl:2: a row must be a JSON object, not NoneType"),
    ("a key twice", "a.jsonl", '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}', "the key 'chosen' st"),
    ("a list", "a.json", f"[{GOOD}, {GOOD}]", [KEPT, KEPT]),
    ("a list over lines", "a.json", json.dumps([row(), row()], indent=4), [KEPT, KEPT]),
    ("a list in .jsonl", "a.jsonl", f"[{GOOD}]", [KEPT]),
    ("an empty list", "a.json", "[]", []),
    ("a list that is cut off", "a.json", f"[{GOOD},", "a.json:1: broken JSON"),
    ("a list without its end", "a.json", f"[{GOOD}\n", "a list of rows needs ',' or ']' here"),
    ("a list without commas", "a.json", f"[{GOOD}\n{GOOD}]", "a.json:2: broken JSON: a list of rows needs"),
    ("a list with a last comma", "a.json", f"[{GOOD},\n]", "a.json:2: broken JSON"),
    ("two lists", "a.json", f"[{GOOD}]\n[{GOOD}]", "a.json:2: broken JSON: text behind the list"),
    ("a list of lists", "a.json", f"[[{GOOD}]]", "row 1 (line 1): a row must be a JSON object, not list"),
    ("a broken row in a list", "a.json", json.dumps([row(), row(chosen=3)], indent=1),
     "row 2 (line 7): field 'chosen' must be a string, not int"),
    ("an object around the rows", "a.json", json.dumps({"data": [row()]}), "if 'data' holds the rows, write that list"),
    ("the same over lines", "a.json", json.dumps({"data": [row()]}, indent=1), "if 'data' holds the rows, write that"),
    ("an object over lines", "a.json", json.dumps(row(), indent=2), [KEPT]),
    ("columns of lists", "a.json", json.dumps({k: [v] for k, v in row().items()}), "a message is an object"),
    ("gzip", "a.jsonl.gz", gzip.compress(GOOD.encode()), [KEPT]),
    ("no gzip", "a.jsonl.gz", GOOD, "broken or incomplete gzip file"),
    ("half of gzip", "a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "broken or incomplete gzip file"),
    ("zstd", "a.jsonl.zst", pa.compress(GOOD.encode(), "zstd", asbytes=True), [KEPT]),
    ("no zstd", "a.jsonl.zst", GOOD, "broken or incomplete zstd file"),
    ("half of zstd", "a.json.zst", pa.compress(GOOD.encode(), "zstd", asbytes=True)[:-4], "incomplete zstd file"),
    ("CSV", "a.csv", "prompt,chosen,rejected\np,a,b\n", [KEPT]),
    ("CSV from Windows", "a.csv", "\ufeffprompt,chosen,rejected\r\np,a,b\r\n", [KEPT]),
    ("CSV in another order", "a.csv", "id,rejected,chosen,prompt\n1,b,a,p\n", [KEPT]),
    ("CSV with quotation marks", "a.csv", 'prompt,chosen,rejected\n"p, ""q""\n",a,b\n', [('p, "q"\n', "a", "b")]),
    ("CSV, an empty cell", "a.csv", "prompt,chosen,rejected\np,,b\n", ["empty response"]),
    ("CSV, conversations", "a.csv",
     'prompt,chosen,rejected\np,"[{""role"": ""assistant"", ""content"": ""a""}]",b\n', [TALK]),
    ("CSV, Python's conversations", "a.csv", "prompt,chosen,rejected\np,[{'role': 'user'}],b\n", "not written as JSON"),
    ("CSV, a cell too many", "a.csv", "prompt,chosen,rejected\np,a,b,c\n", "a.csv:2: 4 cells in a table of 3 columns"),
    ("CSV, a cell too few", "a.csv", "prompt,chosen,rejected\np,a\n", "a.csv:2: 2 cells in a table of 3 columns"),
    ("CSV with semicolons", "a.csv", "prompt;chosen;rejected\np;a;b\n", "separated by semicolons, not commas"),
    ("CSV with tabs", "a.csv", "prompt\tchosen\trejected\np\ta\tb\n", "separated by tabs (.tsv)"),
    ("CSV, an open quotation mark", "a.csv", 'prompt,chosen,rejected\np,"a,b\n', "broken table in the row that begins"),
    ("CSV, a key twice", "a.csv",
     'prompt,chosen,rejected\n"[{""role"": ""user"", ""content"": ""p"", ""content"": ""q""}]",a,b\n',
     "a.csv:2: column 'prompt' holds a conversation that is not written as JSON: the key 'content' stands twice"),
    ("CSV without a head", "a.csv", "p,a,b\nq,c,d\n", "the row has no field 'prompt'; it has: p, a, b"),
    ("CSV, a column twice", "a.csv", "prompt,prompt\np,q\n", "two columns are called 'prompt'"),
    ("TSV", "a.tsv", "prompt\tchosen\trejected\np\ta\tb\n", [KEPT]),
    ("TSV with commas", "a.tsv", "prompt,chosen,rejected\np,a,b\n", "separated by commas (.csv)"),
    ("another suffix", "a.txt", GOOD, "rows are read from files that end in .jsonl"),
    ("Excel", "a.xlsx", b"PK", "rows are read from files that end in .jsonl"),
    ("no parquet", "a.parquet", GOOD, "broken or incomplete parquet file"),
]  # fmt: skip

PAIRS = [
    ("two rows", [row(), row()], [KEPT, KEPT]),
    ("other fields", [row(id=3, source=None, score={"a": [1]})], [KEPT]),
    ("no prompt", [{"chosen": "a", "rejected": "b"}], "share no beginning that ends in 'Assistant:'"),
    ("no side", [{"prompt": "p", "chosen": "a"}], "the row has no field 'rejected'; it has: prompt, chosen"),
    ("nothing", [{}], "it has: nothing"),
    ("other names", [{"question": "p", "yes": "a", "no": "b"}], "it has: question, yes, no"),
    ("upper case", [{"Prompt": "p", "Chosen": "a", "Rejected": "b"}], "it has: Prompt, Chosen, Rejected"),
    ("a null prompt", [row(prompt=None)], ["prompt is null"]),
    ("a null side", [row(chosen=None), row(rejected=None)], ["chosen is null", "rejected is null"]),
    ("an empty prompt", [row(prompt=" \n")], ["empty prompt"]),
    ("an empty side", [row(rejected="\t")], ["empty response"]),
    ("equal sides", [row(rejected="a")], ["chosen equals rejected"]),
    ("a number for a side", [row(chosen=1)], "field 'chosen' must be a string, not int"),
    ("a boolean for a prompt", [row(prompt=True)], "field 'prompt' must be a string, not bool"),
    ("strings in a list", [row(chosen=["a"])], "message 1: a message is an object {role, content}, not str"),
    ("half a character", [line(chosen="\ud83d")], "holds half a surrogate pair"),
    ("an emoji", [row(chosen="\U0001f642")], [("p", "\U0001f642", "b")]),
    ("white space stays", [row(prompt=" p ", chosen=" a\n")], [(" p ", " a\n", "b")]),
    ("conversations", [row(prompt=[user("p")], chosen=[bot("a")], rejected=[bot("b")])], [TALK]),
    ("whole conversations", [hh([user("p"), bot("a")], [user("p"), bot("b")])], [TALK]),
    ("single messages", [row(prompt=user("p"), chosen=bot("a"), rejected=bot("b"))], [TALK]),
    ("other prompts", [hh([user("p"), bot("a")], [user("q"), bot("b")])], ["rejected has another prompt"]),
    ("no reply", [row(chosen=[user("p")])], "must end with a message of role assistant, not with user"),
    ("an empty conversation", [row(chosen=[])], "must end with a message of role assistant, not with nothing"),
    ("a message without a role", [row(chosen=[{"content": "a"}])], "no field 'role'; it has: content"),
    ("a message without content", [row(chosen=[{"role": "assistant"}])], "no field 'content'; it has: role"),
    ("null content", [row(chosen=[bot(None)])], ["content is null"]),
    ("a number for content", [row(chosen=[bot(3)])], "field 'content' must be a string, not int"),
    ("parts", [row(prompt=[user([{"type": "text", "text": "p"}])])], [TALK]),
    ("no parts", [row(prompt=[user([])])], ["empty prompt"]),
    ("an image", [row(prompt=[user([{"type": "image_url", "image_url": {}}])])], ["message part of type image_url"]),
    ("a sound", [row(prompt=[user([{"type": "input_audio"}])])], ["message part of type input_audio"]),
    ("a part without a type", [row(prompt=[user([{"text": "p"}])])], "a part is an object {type, text}"),
    ("a part without text", [row(prompt=[user([{"type": "text"}])])], "the row has no field 'text'; it has: type"),
    ("a part with null text", [row(prompt=[user([{"type": "text", "text": None}])])], ["text is null"]),
    ("ShareGPT", [{"conversations": [{"from": "human", "value": "p"}], "chosen": {"from": "gpt", "value": "a"},
                   "rejected": {"from": "gpt", "value": "b"}}], [TALK]),
    ("ShareGPT, another speaker", [row(prompt=[{"from": "cat", "value": "p"}])], "field 'from' must be one of human"),
    ("ShareGPT, null", [row(prompt=[{"from": "human", "value": None}])], ["value is null"]),
    ("ShareGPT, no value", [row(prompt=[{"from": "human"}])], "no field 'value'; it has: from"),
    ("conversations as text", [{"conversations": "p", "chosen": "a", "rejected": "b"}], "must be a list of messages"),
    ("numbered responses", [{**PKU, "better_response_id": 0}], [KEPT]),
    ("numbered, as text", [{**PKU, "better_response_id": "1"}], [("p", "b", "a")]),
    ("numbered, undecided", [{**PKU, "better_response_id": None}], ["better_response_id is null"]),
    ("numbered, out of range", [{**PKU, "better_response_id": 2}], "must be 0 or 1"),
    ("numbered, a boolean", [{**PKU, "better_response_id": True}], "must be 0 or 1"),
    ("numbered, a null side", [{**PKU, "response_1": None, "better_response_id": 0}], ["response_1 is null"]),
    ("numbered, a side less", [{"prompt": "p", "response_0": "a", "better_response_id": 0}], "no field 'response_1'"),
    ("a common prompt", [hh(f"{HUMAN} a", f"{HUMAN} b")], [(HUMAN, " a", " b")]),
    ("a common prompt and beginning", [hh(f"{HUMAN} No a", f"{HUMAN} No b")], [(HUMAN, " No a", " No b")]),
    ("different dialogues", [hh(f"{HUMAN} a", "\n\nHuman: q\n\nAssistant: b")], ["rejected has another prompt"]),
    ("a common line", [hh("Why?\nSo.", "Why?\nNo.")], [("Why?\n", "So.", "No.")]),
    ("equal texts", [hh("Why?\nSo.", "Why?\nSo.")], ["chosen equals rejected"]),
    ("tools that the template leaves out", [row(prompt=[user("p")], tools=[TOOL])],
     ["tools left out by the chat template"]),
    ("calls that it leaves out", [row(prompt=[user("p")], chosen=[CALL])],
     ["tool calls left out by the chat template"]),
    ("tools that are no JSON", [row(tools="[")], "field 'tools': not valid JSON"),
    ("tools that are no list", [row(tools={"name": "f"})], "field 'tools' must be a list of JSON schemas, not dict"),
    ("no tools", [row(tools=[]), row(tools=None), row(tools="")], [KEPT, KEPT, KEPT]),
    ("a call without a name", [row(chosen=[{**CALL, "tool_calls": [{}]}])], "a tool call is an object {function"),
    ("a call's broken arguments", [row(chosen=[{**CALL, "tool_calls": [{"name": "f", "arguments": "{"}]}])],
     "the arguments of f: not valid JSON"),
    ("calls that are no list", [row(chosen=[{**CALL, "tool_calls": {"name": "f"}}])], "must be a list, not dict"),
]  # fmt: skip

OTHERS = [
    ("hh", "a dialogue", [hh(f"{HUMAN} a", f"{HUMAN} b")], [(HUMAN, " a", " b")]),
    ("hh", "no marks", [hh("a", "b")], ["no assistant turn"]),
    ("hh", "null", [hh(None, f"{HUMAN} b")], ["chosen is null"]),
    ("hh", "an empty reply", [hh(HUMAN, f"{HUMAN} b")], ["empty response"]),
    ("hh", "another dialogue", [hh(f"{HUMAN} a", f"\n\nHuman: q{HUMAN} b")], ["rejected has another prompt"]),
    ("hh", "a side less", [{"chosen": f"{HUMAN} a"}], "the row has no field 'rejected'; it has: chosen"),
    ("hh", "turns", [hh([user("p")], [user("p")])], "field 'chosen' must be a string, not list"),
    ("tldr", "a pair", [row(prompt=QUERY)], [(QUERY, " a", " b")]),
    ("tldr", "null", [row(prompt=QUERY, rejected=None)], ["rejected is null"]),
    ("tldr", "an empty side", [row(prompt=QUERY, rejected=" ")], ["empty response"]),
    ("tldr", "another layout", [{"question": "p"}], "unknown layout with the fields question"),
    ("tldr", "no preference", [{"prompt": "p", "reference": "a", "model_1b": "b", "preferred": None}],
     ["no preference"]),
]  # fmt: skip

CASES = [
    *(("pairs", *case) for case in FILES),
    *(("pairs", what, "a.jsonl", rows, expected) for what, rows, expected in PAIRS),
    *((kind, what, "a.jsonl", rows, expected) for kind, what, rows, expected in OTHERS),
]
FORMATS = {kind: importlib.import_module(ROW_FORMATS[kind]).FORMAT for kind in ("pairs", "hh", "tldr")}


def test_there_are_many_cases_and_none_twice():
    names = [(kind, what) for kind, what, *_ in CASES]
    assert len(names) == len(set(names)) >= 100


def read(path, kind):
    path = str(path)
    options = {"strict": True, "max_rows": None, "render": Renderer(make_chat)}
    readers = FORMATS[kind].readers(DataConfig(kind=kind, path=(path,)), options)
    return readers.preferences(open_source(path))


@pytest.mark.parametrize(
    ("kind", "name", "content", "expected"),
    [(kind, *rest) for kind, _, *rest in CASES],
    ids=[f"{kind}, {what}" for kind, what, *_ in CASES],
)
def test_a_file_gives_its_rows_its_drops_or_an_error(tmp_path, kind, name, content, expected):
    if isinstance(content, list):
        content = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in content)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected)) as caught:
            read(tmp_path / name, kind)
        assert str(tmp_path / name) in str(caught.value)  # every error names its file
        return
    rows, report = read(tmp_path / name, kind)
    kept = [(one.prompt, one.chosen, one.rejected) for one in rows]
    assert kept == [one for one in expected if isinstance(one, tuple)]
    assert sorted(report.dropped.elements()) == sorted(one for one in expected if isinstance(one, str))


def test_a_table_s_nulls_are_absent_fields(tmp_path):
    """In parquet every message has the keys of all of them."""
    call = {"role": "assistant", "content": None, "tool_calls": None, "name": "x"}
    rows = [row(prompt=[user("p")], chosen=[bot("a")], rejected=[bot("b")]),
            row(prompt=[user("p")], chosen=[call], rejected=[bot("b")], tools=None)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    kept, report = read(tmp_path / "a.parquet", "pairs")
    assert [(one.prompt, one.chosen, one.rejected) for one in kept] == [TALK]
    assert dict(report.dropped) == {"content is null": 1}
