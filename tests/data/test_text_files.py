"""mpo_jax.data.text_files: lists, tables and compressed files, and where they are broken."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest

from mpo_jax.data import text_files
from mpo_jax.data.sources import open_source
from mpo_jax.errors import UserError
from tests.data.test_sources import numbered, rows_of, save_jsonl, save_zstd


@pytest.mark.parametrize("line", ["[", "  [", '[{"n": 1}', '[\n{"n": 1},', '[{"n": 1} {"n": 2}]', '[{"n": 1},]'])
def test_a_broken_list_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "a.json"
    path.write_text("\n" + line)
    with pytest.raises(UserError, match=rf"a\.json:{2 + line.count(chr(10))}: broken JSON: "):
        rows_of(path)


def test_the_rows_of_a_list_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"n": 0},\n\n {"n": 1}, {"n": 2}, broken')
    found = list(open_source(str(path)).rows(3))
    assert found[1:] == [(f"{path} row 2 (line 3)", {"n": 1}), (f"{path} row 3 (line 3)", {"n": 2})]
    for empty in ("[]", " [ ] \n", "", "\n"):
        path.write_text(empty)
        assert rows_of(path) == []


def test_a_broken_zstd_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    save_zstd(numbered(0, 30), path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole)  # as `cat` joins them
    assert rows_of(path) == numbered(0, 30) * 2
    for content in (whole[:-3], b"no zstd at all", whole[:6] + b"xxxx" + whole[10:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.zst: broken or incomplete zstd file after line \d+"):
            rows_of(path)


# tables

TALK = [{"role": "user", "content": "hi, you"}, {"role": "assistant", "content": 'say "x"'}]


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("a.tsv.zst", "\t")]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_has_a_row_per_record(tmp_path, name, separator, end):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator, lineterminator=end)
    hard = ["a,b", 'c"d', "e\tf", "g\n\nh", "", " ", "漢", "1", "x" * 200_000]
    writer.writerows([["prompt", "chosen"], *([text, text[::-1]] for text in hard), ["p", json.dumps(TALK)]])
    content = ("\ufeff" + out.getvalue() + end).encode()
    pack = {".gz": gzip.compress, ".zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
    (tmp_path / name).write_bytes(pack.get((tmp_path / name).suffix, bytes)(content))
    found = rows_of(tmp_path / name)
    assert found == [*({"prompt": t, "chosen": t[::-1]} for t in hard), {"prompt": "p", "chosen": TALK}]
    assert rows_of(tmp_path / name, 2) == found[:2]
    places = [place for place, _ in open_source(str(tmp_path / name)).rows()]
    assert places[3:5] == [f"{tmp_path / name}:{line}" for line in (5, 10)]  # the lines in which rows begin


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", r":3: 1 cells in a table of 2 columns: put quotation marks"),
        ("a,b\n1,2,3\n", r":2: 3 cells in a table of 2 columns"),
        ("a,a\n1,2\n", ":1: two columns are called 'a': rename one"),
        ("a;b\n1;2\n", ":1: the columns are separated by semicolons, not commas: save the table with commas"),
        ("a|b\n1|2\n", ":1: the columns are separated by bars, not commas: save the table with commas"),
        ("a\tb\n1\t2\n", r":1: the columns are separated by tabs \(\.tsv\): save"),
        ('a,b\n1,"2\n3,4\n', ":2: broken table in the row that begins here: "),
        ('a,b\n1,"2"x\n', ":2: broken table in the row that begins here: "),
        ("a,b\n1,\"[{'role': 'user'}]\"\n", ":2: column 'b' holds a conversation that is not written as JSON"),
    ],
)
def test_a_broken_table_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/a.csv{message}"):
        rows_of(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"a,b\n1,2\n\xff,2\n")
    with pytest.raises(UserError, match=r"b\.csv:3: not UTF-8 text"):
        rows_of(tmp_path / "b.csv")


def test_a_folder_without_other_rows_is_its_tables(tmp_path, capsys):
    (tmp_path / "b.csv").write_text("n\n1\n")
    (tmp_path / "a.tsv").write_text("n\n0\n")
    assert rows_of(tmp_path) == [{"n": "0"}, {"n": "1"}]
    save_jsonl(numbered(5, 6), tmp_path / "c.jsonl")  # then they may be something else, such as statistics
    (tmp_path / "deeper").mkdir()
    save_jsonl(numbered(6, 7), tmp_path / "deeper" / "d.jsonl")
    (tmp_path / "dataset_info.json").write_text("{}")
    for _ in range(2):
        assert rows_of(tmp_path) == numbered(5, 6)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("is read as its c.jsonl alone, without a.tsv, b.csv, deeper/d.jsonl: if these hold rows") == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.json"])
def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, name):
    """A compressed file of some MB can hold a line of some GB."""
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1 << 20)
    head = b"prompt\n" if name == "a.csv" else b""
    content = head + b'{"prompt": "a"}\n' + b'{"prompt": "' + b"a" * (2 << 20)
    pack = {".gz": gzip.compress, ".zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
    (tmp_path / name).write_bytes(pack.get((tmp_path / name).suffix, bytes)(content))
    with pytest.raises(UserError, match=rf"{name}:{3 if head else 2}: the line has more than 1 MiB, .*: drop the row"):
        rows_of(tmp_path / name)


def test_a_row_of_many_lines_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    """Quotation marks make one row of any number of lines."""
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1 << 10)
    for rest in (('"' + "a" * 500 + '\n",') * 2000, '"\n",' * 2000, '"' + "a\n" * 2000):
        (tmp_path / "a.csv").write_text("prompt,chosen\nno,yes\n" + rest)
        with pytest.raises(UserError, match=r"a\.csv:3: the row that begins here has more than 0 MiB"):
            rows_of(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("prompt,chosen\n" + '"no\n",yes\n' * 2000)
    assert len(rows_of(tmp_path / "a.csv")) == 2000


def test_a_list_may_be_longer_than_a_row_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1 << 10)
    rows = numbered(0, 1000)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert rows_of(tmp_path / "a.json") == rows
    monkeypatch.setattr(text_files, "MAX_LIST_BYTES", 1 << 12)
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent))
        with pytest.raises(UserError, match=r"a\.json:\d+: the list of rows has more than 0 MiB.*one object per line"):
            rows_of(tmp_path / "a.json")


def test_two_byte_order_marks_are_none_of_a_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfn\n1\n")
    assert rows_of(tmp_path / "a.csv") == [{"n": "1"}]


@pytest.mark.parametrize("row", ['{"n": 1, "n": 2}', '{"a": {"n": 1, "n": 1}}', '[{"n": 1, "n": 2}]'])
def test_a_key_that_stands_twice_is_refused(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"a\.jsonl.*1.*: the key 'n' stands twice in one object: remove one"):
        rows_of(tmp_path / "a.jsonl")
