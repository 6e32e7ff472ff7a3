"""mpo_jax.data.sources: every kind of file gives back what was written, and says where it is broken."""

import gzip
import json
import random
import subprocess
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mpo_jax.data import sources
from mpo_jax.data.sources import fingerprint_files, open_source
from mpo_jax.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": TEXTS, "chosen": st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), min_size=1)}
    ),
    min_size=1,
    max_size=5,
)
HARD = [
    {"prompt": text, "chosen": [{"role": "user", "content": text}]}
    for text in ("", "a\r\nb\rc\n", "\U0001f469\u200d\U0001f680 ünï\u2028\x85\x1f", " \t", "\ufeff", "漢" * 350_000)
]


def save_jsonl(rows, path, end="\n", start=b"", ascii_only=False):
    content = start + "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows).encode()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def save_parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path)


def save_arrow(rows, path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(path)


def save_list(rows, path, indent=2):
    content = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def save_zstd(rows, path):
    path.write_bytes(pa.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), "zstd", asbytes=True))


WRITERS = {
    "unix.jsonl": save_jsonl,
    "unix.json": save_jsonl,
    "ascii.jsonl.gz": lambda rows, path: save_jsonl(rows, path, ascii_only=True),
    "windows.jsonl": lambda rows, path: save_jsonl(rows, path, end="\r\n", start=b"\xef\xbb\xbf"),
    "windows.jsonl.gz": lambda rows, path: save_jsonl(rows, path, end="\r\n", start=b"\xef\xbb\xbf"),
    "list.json": save_list,
    "list.json.gz": save_list,
    "one_line.jsonl": lambda rows, path: save_list(rows, path, indent=None),
    "indented.json": lambda rows, path: path.write_text("\n".join(json.dumps(row, indent=1) for row in rows)),
    "packed.jsonl.zst": save_zstd,
    "upper.JSONL": save_jsonl,
    "table.parquet": save_parquet,
    "saved": save_arrow,
}


def rows_of(path, max_rows=None):
    return [row for _, row in open_source(str(path)).rows(max_rows)]


def numbered(begin, end):
    return [{"n": n} for n in range(begin, end)]


# reading


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(rows=HARD)
@given(rows=ROWS)
def test_rows_come_back_bit_for_bit(tmp_path_factory, name, rows):
    path = tmp_path_factory.mktemp("rows") / name
    WRITERS[name](rows, path)
    assert rows_of(path) == rows


def test_the_place_of_a_row_counts_from_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n\n  \n{"n": 1}\n')
    save_parquet(numbered(0, 600), tmp_path / "b.parquet")
    save_arrow(numbered(0, 2), tmp_path / "c")
    for name, place, count in [("a.jsonl", ":4", 2), ("b.parquet", " row 600", 600), ("c", " row 2", 2)]:
        rows = list(open_source(str(tmp_path / name)).rows())
        assert rows[-1] == (f"{tmp_path / name}{place}", {"n": count - 1}) and len(rows) == count


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("max_rows", [1, 2, 300, 301, None])
def test_max_rows_are_the_first(tmp_path, name, max_rows):
    rows = numbered(0, 300)
    WRITERS[name](rows, tmp_path / name)
    assert rows_of(tmp_path / name, max_rows) == rows[:max_rows]


def test_max_rows_leave_the_rest_unread(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\nbroken\n')
    assert rows_of(path, 2) == numbered(0, 2)
    with pytest.raises(UserError, match=r"a\.jsonl:3: broken JSON: Expecting value \(column 1\)"):
        rows_of(path, 3)


def test_a_folder_is_its_files_in_order(tmp_path):
    save_jsonl(numbered(6, 9), tmp_path / "c.jsonl")
    save_parquet(numbered(3, 6), tmp_path / "b.parquet")
    save_jsonl(numbered(0, 3), tmp_path / "a.jsonl.gz")
    for name in ("README.md", "dataset_infos.json", ".hidden.jsonl", "._a.jsonl"):
        (tmp_path / name).write_text("no row")
    (tmp_path / "inner.jsonl").mkdir()
    source = open_source(str(tmp_path))
    assert rows_of(tmp_path) == numbered(0, 9)
    assert [row["n"] for _, row in source.rows(1)] == [0, 3, 6]  # of each file
    names = ["a.jsonl.gz", "b.parquet", "c.jsonl"]
    assert [file.name for file in source.files()] == names and source.name == str(tmp_path)
    assert [place for place, _ in source.rows(1)] == [
        f"{tmp_path}/a.jsonl.gz:1", f"{tmp_path}/b.parquet row 1", f"{tmp_path}/c.jsonl:1",
    ]  # fmt: skip


def test_a_file_names_itself(tmp_path):
    save_jsonl(numbered(0, 1), tmp_path / "a.jsonl")
    source = open_source(str(tmp_path / "a.jsonl"))
    assert (source.name, source.files()) == (str(tmp_path / "a.jsonl"), [tmp_path / "a.jsonl"])


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_jsonl(numbered(0, 2), tmp_path / "a.jsonl")
    assert [place for place, _ in open_source("~/a.jsonl").rows()] == ["~/a.jsonl:1", "~/a.jsonl:2"]


def test_a_saved_data_set_has_its_files_and_all_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([{"a": "x", "n": n} for n in range(10)])
    data.with_format("numpy", columns=["n"]).save_to_disk(tmp_path / "d", num_shards=3)
    assert rows_of(tmp_path / "d") == [{"a": "x", "n": n} for n in range(10)]
    assert type(rows_of(tmp_path / "d")[0]["n"]) is int
    files = open_source(str(tmp_path / "d")).files()
    assert [file.name for file in files] == [f"data-0000{n}-of-00003.arrow" for n in range(3)]
    assert all(file.is_file() for file in files)


def test_a_folder_of_splits_lists_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(numbered(0, 3))
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "d")
    with pytest.raises(
        UserError, match=f"{tmp_path}/d holds several splits; .*: {tmp_path}/d/test, {tmp_path}/d/train$"
    ):
        open_source(str(tmp_path / "d"))
    assert rows_of(tmp_path / "d" / "test") == numbered(0, 3)


# faults


def test_what_cannot_be_a_source_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a,b\n")
    (tmp_path / "inner").mkdir()
    with pytest.raises(UserError, match=r"no data file .*absent\.jsonl \(.*hub:ORG/NAME"):
        open_source(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=r"a\.txt: rows are read from files that end in \.jsonl, .* or \.parquet"):
        open_source(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"holds no \.jsonl, .*it holds: a\.txt, inner"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="it holds: nothing"):
        open_source(str(tmp_path / "inner"))


def test_a_broken_gzip_file_is_named(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "a.jsonl.gz"
    save_jsonl([{"n": rng.random()} for _ in range(3000)], path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-4], whole[:-6] + bytes(6), b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: broken or incomplete gzip file after line \d+"):
            rows_of(path)
    path.write_bytes(bytes([*whole[: len(whole) // 2], whole[len(whole) // 2] ^ 0xFF, *whole[len(whole) // 2 + 1 :]]))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):  # the rows before the checksum may be damaged first
        rows_of(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": ', r":2: broken JSON: Expecting value \(column 6\)"),
        (b'{"n": 1} {', r":2: broken JSON: Extra data \(column 10\)"),
        (b"[" * 100_000, ":2: broken JSON: nested more than 100 deep"),
        (b'{"n": 1' + b"0" * 5000 + b"}", ":2: broken JSON: Exceeds the limit"),
        (b'[{"n": 1}]', ":2: a row must be a JSON object, not list: write one object per line"),
        (b"null", ":2: a row must be a JSON object, not NoneType"),
        (b'{"n": "\xff"}', ":2: not UTF-8 text: invalid start byte"),
        ('{"n": 1}'.encode("utf-16"), ":2: not UTF-8 text"),
        (b'\xef\xbb\xbf{"n": 1}', ":2: broken JSON"),  # a byte-order mark stands only at a file's start
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_broken_line_is_named(tmp_path, line, message, suffix):
    path = tmp_path / f"a{suffix}"
    content = b'{"n": 0}\n' + line + b'\n{"n": 2}\n'
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    with pytest.raises(UserError, match=f"{path}{message}"):
        rows_of(path)


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    save_parquet(numbered(0, 3000), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"x" * 99, whole[:4] + bytes(200) + whole[204:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet: broken or incomplete parquet file after row 0: \S"):
            rows_of(path)
    text = pa.chunked_array([["x"] * 300, pa.array([b"\xff"], pa.binary()).view(pa.string())])
    pq.write_table(pa.table({"a": text}), path)
    with pytest.raises(UserError, match=r"a\.parquet: broken or incomplete parquet file after row 256: .*codec"):
        rows_of(path)


def test_a_broken_saved_data_set_is_named(tmp_path):
    save_arrow(numbered(0, 3000), tmp_path / "d")
    path = tmp_path / "d" / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"x" * 300):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"/d: broken or incomplete arrow data set.*: \S"):
            rows_of(tmp_path / "d")
    path.unlink()
    with pytest.raises(UserError, match="/d: broken or incomplete arrow data set"):
        open_source(str(tmp_path / "d")).files()


# the library `datasets`


def test_without_datasets_only_what_needs_it_fails(tmp_path, monkeypatch):
    save_jsonl(numbered(0, 2), tmp_path / "a.jsonl")
    save_parquet(numbered(0, 2), tmp_path / "b.parquet")
    save_arrow(numbered(0, 2), tmp_path / "c")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert rows_of(tmp_path / "a.jsonl") == rows_of(tmp_path / "b.parquet") == numbered(0, 2)
    for spec in (str(tmp_path / "c"), "hub:org/uninstalled"):
        with pytest.raises(UserError, match=f"{spec} needs the package datasets.*: pip install datasets"):
            rows_of(spec)


def test_datasets_is_not_imported_for_files(tmp_path):
    save_jsonl(numbered(0, 2), tmp_path / "a.jsonl")
    save_parquet(numbered(0, 2), tmp_path / "b.parquet")
    program = (
        "import sys; from mpo_jax.data.sources import open_source\n"
        "for path in sys.argv[1:]: assert len(list(open_source(path).rows())) == 2\n"
        "assert 'datasets' not in sys.modules and 'pyarrow' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "a.jsonl", tmp_path / "b.parquet"], check=True)


class FakeDatasets(types.ModuleType):
    """Stands for the library: what it is asked, and what it answers."""

    def __init__(self, answer):
        super().__init__("datasets")
        self.answer, self.calls = answer, []
        self.configs, self.splits = ["default"], ["train"]

    def get_dataset_config_names(self, name, revision=None):
        return self.configs

    def get_dataset_split_names(self, name, config, revision=None):
        assert config == self.configs[0]
        return self.splits

    def load_dataset(self, path, **options):
        self.calls.append((path, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def hub(monkeypatch):
    def put(answer):
        sources._load_hub.cache_clear()
        fake = FakeDatasets(answer)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        return fake

    yield put
    sources._load_hub.cache_clear()


@pytest.mark.parametrize(
    ("spec", "name", "revision", "folder", "split"),
    [
        ("hub:org/name", "org/name", None, None, "train"),
        ("hub:name", "name", None, None, "train"),
        ("hub:Org-1/na.me_2@v1", "Org-1/na.me_2", "v1", None, "train"),
        ("hub:org/name:harmless-base", "org/name", None, "harmless-base", "train"),
        ("hub:org/name:a/b:test", "org/name", None, "a/b", "test"),
        ("hub:org/name::test", "org/name", None, None, "test"),
        ("hub:org/name@refs/convert/parquet:comparisons:validation", "org/name", "refs/convert/parquet",
         "comparisons", "validation"),
    ],
)  # fmt: skip
def test_a_hub_name_has_revision_folder_and_split(hub, tmp_path, spec, name, revision, folder, split):
    datasets = pytest.importorskip("datasets")
    save_arrow(numbered(0, 5), tmp_path / "d")
    fake = hub(datasets.load_from_disk(str(tmp_path / "d")))
    source = open_source(spec)
    assert fake.calls == []  # nothing is loaded before it is asked for
    assert list(source.rows(2)) == [(f"{spec} row 1", {"n": 0}), (f"{spec} row 2", {"n": 1})]
    assert source.name == spec and source.files() == [tmp_path / "d" / "data-00000-of-00001.arrow"]
    options = {"revision": revision, "data_dir": folder, "split": split, "keep_in_memory": False}
    assert fake.calls == [(name, options)]  # once, so that all answers are of one state of the hub


@pytest.mark.parametrize(
    ("part", "configs", "splits", "options"),
    [
        ("train_prefs", ["default"], ["train_prefs", "test_prefs"], {"data_dir": None, "split": "train_prefs"}),
        ("helpful", ["helpful", "harmless"], [], {"name": "helpful", "split": "train"}),
        ("helpful:test", ["helpful", "harmless"], [], {"name": "helpful", "split": "test"}),
        ("default:test", ["default"], ["train", "test"], {"name": "default", "split": "test"}),
        ("data", ["default"], ["train"], {"data_dir": "data", "split": "train"}),
        ("train", ["a", "b"], [], {"data_dir": "train", "split": "train"}),
        ("train", None, [], {"data_dir": "train", "split": "train"}),  # the hub cannot be asked
    ],
)
def test_a_part_of_a_hub_name_is_a_configuration_a_split_or_a_folder(hub, part, configs, splits, options):
    fake = hub(ValueError("not here"))
    fake.configs, fake.splits = configs, splits
    with pytest.raises(UserError, match="not here") as caught:
        open_source(f"hub:org/name:{part}").files()
    assert fake.calls == [("org/name", {"revision": None, "keep_in_memory": False, **options})]
    if configs == ["a", "b"]:
        assert "Its configurations: a, b. Check the spelling" in str(caught.value)
    if options.get("data_dir") == "data":
        assert "Its splits: train. Check the spelling" in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["hub:", "hub:a/b/c", "hub:a b", "hub:a/b@", "hub:a/b:c:d:e", "hub:https://x/y", "hub:a/b::t[:9]"]
)
def test_a_malformed_hub_name_is_refused(spec):
    with pytest.raises(UserError, match=r"is not a hub data set: write hub:ORG/NAME\[@REVISION\]"):
        open_source(spec)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ConnectionError("Couldn't reach 'org/name' on the Hub (x)"), r"Check the connection .*download the files"),
        (TimeoutError("slow"), "Check the connection"),
        (FileNotFoundError("Dataset 'org/name' doesn't exist on the Hub"), r"Check the spelling .*`hf auth login`"),
        (FileNotFoundError("'org/name' is a gated dataset on the Hub."), r"datasets/org/name and .*`hf auth login`"),
        (ValueError('Unknown split "tarin". Should be one of'), r'split "tarin".*Check the spelling'),
        (RuntimeError("Dataset scripts are no longer supported, but found n.py"), "hub:org/name@refs/convert/parquet"),
        (KeyError(), r"KeyError\. Check the spelling"),
    ],
)  # fmt: skip
def test_a_failure_of_the_hub_says_what_to_do(hub, error, advice):
    hub(error)
    for use in (lambda source: list(source.rows()), lambda source: source.files()):
        with pytest.raises(UserError, match=f"cannot load hub:org/name:.*{advice}"):
            use(open_source("hub:org/name"))


def test_no_token_is_shown(hub):
    hub(ValueError("bad header hf_AbCdEfGh123 in request\nand more"))
    with pytest.raises(UserError) as caught:
        list(open_source("hub:org/name").rows())
    assert "hf_***" in str(caught.value) and "AbCd" not in str(caught.value) and "and more" not in str(caught.value)


# the fingerprint


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
    with pytest.raises(UserError, match=r"no data file .*absent"):
        fingerprint_files([tmp_path / "absent"])
