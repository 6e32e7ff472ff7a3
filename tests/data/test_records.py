"""mpo_jax.data.records: every kind of row and fault, and the counts of the real files."""

import gzip
import json
import random

import pytest

from mpo_jax.data.records import (
    DataReport,
    Demonstration,
    Preference,
    fingerprint_files,
    is_validation,
    read_demonstrations,
    read_hh,
    read_jsonl,
    read_pairs_of,
    read_preferences,
)
from mpo_jax.errors import UserError

H, A = "\n\nHuman:", "\n\nAssistant:"
PROMPT = f"{H} hi{A} hello{H} why?{A}"


def write(path, rows):
    """Rows as JSON lines; bytes and strings as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


# the real files


@pytest.mark.parametrize(
    ("name", "read", "distinct", "strict"),
    [("helpful-base", 2354, 2352, None), ("harmless-base", 2312, 2312, 2299)],
)
def test_real_hh_has_the_papers_row_counts(shared_data, name, read, distinct, strict):
    path = shared_data / "hh-rlhf" / f"{name}.test.jsonl.gz"
    rows, report = read_hh(path, strict=False)
    assert (report.read, report.kept, len(rows), report.dropped) == (read, read, read, {})
    raw = [row for _, row in read_jsonl(path)]
    assert sum(row["chosen"] != row["rejected"] for row in raw) == distinct
    assert [row.prompt + row.chosen for row in rows] == [row["chosen"] for row in raw]  # not a character is lost
    kept, report = read_hh(path)
    assert report.read == read and len(kept) == report.kept == read - report.dropped.total()
    assert report.dropped["chosen equals rejected"] == read - distinct
    if strict is not None:
        assert report.kept == strict
    whole = {(row["chosen"], row["rejected"]) for row in raw}
    for row in kept:
        assert row.prompt.endswith(A) and row.group == row.prompt
        assert (row.prompt + row.chosen, row.prompt + row.rejected) in whole
    assert any("\n\n" in row.chosen for row in kept)


# HH rows


def test_hh_prompt_ends_at_the_last_assistant_turn(tmp_path):
    path = write(tmp_path / "a.jsonl", [hh(PROMPT + " because", PROMPT + " no idea")])
    rows, report = read_hh(path)
    assert rows == [Preference(PROMPT, " because", " no idea", PROMPT)]
    assert report.to_dict() == {"source": str(path), "read": 1, "kept": 1, "dropped": {}}


def test_blank_lines_inside_a_turn_stay(tmp_path):
    prompt = f"{H} one\n\ntwo\n\n\nthree{A}"
    rows, _ = read_hh(write(tmp_path / "a.jsonl", [hh(f"{prompt} x\n\ny\n", f"{prompt} \n\nz")]))
    assert rows == [Preference(prompt, " x\n\ny\n", " \n\nz", prompt)]


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
def test_strict_drops_a_row_and_says_why(tmp_path, chosen, rejected, reason):
    good = hh(PROMPT + " good", PROMPT + " bad")
    path = write(tmp_path / "a.jsonl", [good, hh(chosen, rejected), good])
    rows, report = read_hh(path)
    assert (len(rows), report.read, report.kept, dict(report.dropped)) == (2, 3, 2, {reason: 1})
    rows, report = read_hh(path, strict=False)
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
    rows, _ = read_hh(write(tmp_path / "a.jsonl", [hh(chosen, rejected)]), strict=False)
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [expected]


# plain rows


def test_preferences_and_demonstrations(tmp_path):
    def pair(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "more": 1}

    path = write(
        tmp_path / "pairs.jsonl",
        [pair("p\n\nq", " a", " b"), pair("p", "a", "a"), pair(" ", "a", "b"), pair("p", "", "b"), pair("p", "a", " ")],
    )
    rows, report = read_preferences(path)
    assert rows == [Preference("p\n\nq", " a", " b", "p\n\nq")]
    dropped = {"chosen equals rejected": 1, "empty prompt": 1, "empty response": 2}
    assert report == DataReport(str(path), 5, 1, report.dropped) and dict(report.dropped) == dropped

    demonstrations = [{"prompt": "p", "response": " a"}, {"prompt": "p", "completion": " b"}]
    both = {"prompt": "p", "response": " c", "completion": " d"}
    empty = [{"prompt": "", "response": "a"}, {"prompt": "p", "completion": "\n"}]
    path = write(tmp_path / "sft.jsonl", [*demonstrations, both, *empty])
    rows, report = read_demonstrations(path)
    assert rows == [Demonstration("p", response, "p") for response in (" a", " b", " c")]
    assert (report.read, report.kept, dict(report.dropped)) == (5, 3, {"empty prompt": 1, "empty response": 1})


def test_the_kind_chooses_the_reader(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": PROMPT + " x", "rejected": PROMPT}])
    assert read_pairs_of("pairs", path, strict=True, max_rows=None)[0][0].prompt == "p"
    assert read_pairs_of("hh", path, strict=False, max_rows=None)[0][0].prompt == PROMPT
    assert read_pairs_of("hh", path, strict=True, max_rows=None)[0] == []


# files


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_are_numbered_blank_ones_skipped_and_max_rows_counts_rows(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ['{"a": 1}', "", '{"a": "ü\u2028x"}\r', "  ", '{"a": 3}', "broken"])
    expected = [(1, {"a": 1}), (3, {"a": "ü\u2028x"}), (5, {"a": 3})]
    assert list(read_jsonl(path, 3)) == expected
    assert list(read_jsonl(path, 2)) == expected[:2]
    with pytest.raises(UserError):
        list(read_jsonl(path))


def test_max_rows_counts_what_is_read_not_what_is_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", [hh(PROMPT + " x", PROMPT + " x"), *[hh(PROMPT + " x", PROMPT + " y")] * 3])
    rows, report = read_hh(path, max_rows=2)
    assert (len(rows), report.read, report.kept) == (1, 2, 1)


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
FAULTS = {
    "broken JSON": ([GOOD, "", '{"prompt": '], r"{path}:3: broken JSON: Expecting value \(column 11\)"),
    "no object": ([GOOD, "[1]"], "{path}:2: a row must be a JSON object, not list"),
    "missing field": (
        [GOOD, '{"prompt": "p", "chosen": "a"}'],
        "{path}:2: the row has no field 'rejected'; it has: pr",
    ),
    "empty object": (["{}"], "{path}:1: the row has no field 'prompt'; it has: nothing"),
    "wrong type": ([GOOD, GOOD.replace('"b"', "3")], "{path}:2: field 'rejected' must be a string, not int"),
    "half a character": ([GOOD, GOOD.replace('"b"', r'"\ud83d"')], "{path}:2: field 'rejected' holds half a surrogate"),
    "not UTF-8": ([*[GOOD] * 4, GOOD.encode().replace(b"a", b"\xff"), GOOD], "{path}:5: not UTF-8 text"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(("rows", "message"), FAULTS.values(), ids=FAULTS)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, rows, message, suffix):
    path = write(tmp_path / f"a{suffix}", rows)
    with pytest.raises(UserError, match=message.replace("{path}", str(path))):
        read_preferences(path)


def test_a_broken_gzip_file_is_named(tmp_path):
    rng = random.Random(0)
    rows = [{"prompt": "p", "chosen": f"{rng.random()}", "rejected": f"{rng.random()}"} for _ in range(3000)]
    path = write(tmp_path / "a.jsonl.gz", rows)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-4], whole[:-6] + bytes(6), b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: broken or incomplete gzip file after line \d+"):
            read_preferences(path)
    path.write_bytes(bytes([*whole[: len(whole) // 2], whole[len(whole) // 2] ^ 0xFF, *whole[len(whole) // 2 + 1 :]]))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):  # the rows before the checksum may be damaged first
        read_preferences(path)


def test_a_missing_file_is_named(tmp_path):
    for read in (read_hh, read_preferences, read_demonstrations, lambda path: fingerprint_files([path])):
        with pytest.raises(UserError, match=r"no data file .*absent\.jsonl: check data\.path"):
            read(tmp_path / "absent.jsonl")


# the split and the fingerprint

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


def test_the_fingerprint_is_of_content_and_order_not_of_names(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_text("one")
    b.write_text("one")
    c.write_text("two")
    assert fingerprint_files([a]) == fingerprint_files([b])
    assert len({fingerprint_files(files) for files in ([], [a], [c], [a, a], [a, c], [c, a])}) == 6
    before = fingerprint_files([a])
    a.write_text("One")
    assert fingerprint_files([a]) != before
