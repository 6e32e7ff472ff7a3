"""The table of pairs on disk and in memory: values, old files, and how much memory its ids take."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_jax.data import pair_table
from mpo_jax.data.pair_table import FILE, PairTable
from mpo_jax.data.token_lists import Growing, TokenLists, from_arrow, to_arrow
from mpo_jax.data.tokens import Example
from mpo_jax.stages import dpo, ppo, select
from mpo_jax.stages.settings import Split
from mpo_jax.training.refill import Samples, with_responses
from mpo_jax.types import Artifact

LENGTHS = [(3, 0), (1, 4), (0, 0), (2, 2), (5, 1)]


def a_table() -> PairTable:
    """Five pairs with lists of ids of every kind: lists, arrays and empty ones."""
    rng = np.random.default_rng(0)
    ids: Any = [tuple(rng.integers(0, 2**31 - 1, n).astype(np.int32) for n in pair) for pair in LENGTHS]
    ids[1] = tuple(one.tolist() for one in ids[1])
    score = rng.normal(size=(5, 2)).astype(np.float32)
    return PairTable(
        prompt=["a", "b", "", "\u00e9\n", "a"],
        response=[(f"one {i}", f"two {i}") for i in range(5)],
        ids=ids,
        score=score,
        chosen=np.asarray([0, 1, 0, 1, 1], np.int32),
        gap=np.abs(score[:, 0] - score[:, 1]),
        utility=np.asarray([[0.5, np.nan]] * 5),
    )


def assert_equal(found: PairTable, table: PairTable) -> None:
    assert len(found) == len(table)
    assert list(found.prompt) == list(table.prompt) and list(found.response) == list(table.response)
    for row, pair in enumerate(table.ids):
        for side in (0, 1):
            assert list(found.ids[row][side]) == list(pair[side])
    for name in ("score", "chosen", "gap", "utility"):
        np.testing.assert_array_equal(getattr(found, name), getattr(table, name))
        assert getattr(found, name).dtype == getattr(table, name).dtype


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 4096])
def test_a_table_is_read_as_written(tmp_path, monkeypatch, chunk_rows):
    monkeypatch.setattr(pair_table, "CHUNK_ROWS", chunk_rows)
    table = a_table()
    table.write(tmp_path)
    found = PairTable.read(tmp_path)
    assert_equal(found, table)
    assert [len(pair) for pair in found.ids[1:3]] == [2, 2] and list(found.prompt[3:]) == ["\u00e9\n", "a"]
    found.write(tmp_path)
    assert_equal(PairTable.read(tmp_path), table)


def test_the_file_holds_plain_columns(tmp_path):
    table = a_table()
    table.write(tmp_path)
    plain = pq.read_table(tmp_path / FILE)
    assert plain.column_names == [
        "prompt", "response_0", "ids_0", "score_0", "utility_0", "response_1", "ids_1", "score_1", "utility_1",
        "chosen", "gap",
    ]  # fmt: skip
    assert plain["ids_0"].type == pa.list_(pa.int32())
    assert plain["ids_1"].to_pylist() == [list(pair[1]) for pair in table.ids]


def test_it_says_where_its_pairs_are_split():
    table = a_table()
    border = Split(easy_fraction=0.4)
    third = sorted(table.gap)[2]
    assert table.describe_split("easy", border) == f"2 of 5 pairs are easy: their gap is above {third:.4g}"
    assert table.describe_split("hard", Split(threshold=9.0)) == "5 of 5 pairs are hard: their gap is at most 9"
    assert table.describe_split("all", Split()) == ""


def test_files_with_int64_ids_are_read(tmp_path):
    """As earlier versions wrote them, in one row group."""
    table, columns = a_table(), {}
    for side in (0, 1):
        columns[f"response_{side}"] = [pair[side] for pair in table.response]
        columns[f"ids_{side}"] = [[int(i) for i in pair[side]] for pair in table.ids]
        columns[f"score_{side}"] = table.score[:, side]
        columns[f"utility_{side}"] = table.utility[:, side]
    columns |= {"prompt": table.prompt, "chosen": table.chosen, "gap": table.gap}
    pq.write_table(pa.table(columns), tmp_path / FILE)
    assert pq.read_schema(tmp_path / FILE).field("ids_0").type == pa.list_(pa.int64())
    assert_equal(PairTable.read(tmp_path), table)


def test_texts_and_ids_are_read_when_used(tmp_path, monkeypatch):
    a_table().write(tmp_path)
    used: list[str] = []
    chunks = pair_table._chunks
    monkeypatch.setattr(pair_table, "_chunks", lambda path, name: used.append(name) or chunks(path, name))
    table = PairTable.read(tmp_path)
    assert len(table) == len(table.ids) == 5 and used == []
    assert table.prompt[0] == "a" and used == ["prompt"]
    assert len(table.ids[0][0]) == 3 and table.prompt[1] == "b" and used == ["prompt", "ids_0", "ids_1"]


def test_an_empty_table(tmp_path):
    none = np.zeros((0, 2))
    PairTable([], [], [], none, np.zeros(0), np.zeros(0), none).write(tmp_path)
    table = PairTable.read(tmp_path)
    assert len(table) == 0 and list(table.ids) == [] and table.score.shape == (0, 2)


def test_lists_are_views_into_one_array():
    found = from_arrow([to_arrow([[1, 2], [], [3]]), to_arrow([]), to_arrow([np.asarray([4, 5], np.int32)])])
    assert [list(ids) for ids in found] == [[1, 2], [], [3], [4, 5]] and list(found[-1]) == [4, 5]
    assert all(np.shares_memory(ids, found.ids) for ids in found if len(ids))
    assert found[0].dtype == np.int32 and not found[0].flags.writeable
    assert list(TokenLists(np.zeros(0, np.int32), np.zeros(0, np.int64))) == [] and len(Growing().lists) == 0
    with pytest.raises(IndexError):
        found[4]


def peak(work: Callable[[], Any]) -> int:
    """Bytes that Python, NumPy and Arrow hold at most while it runs."""
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def made_up(folder: Path, rows: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """What selection, DPO and PPO do with ids, on rows whose texts take nothing."""
    ids = np.random.default_rng(0).integers(300, 30_000, (rows, 2, tokens)).astype(np.int32)
    samples = Samples(ids, np.full((rows, 2), tokens, np.int32), np.ones((rows, 2), bool))
    scores = np.random.default_rng(1).normal(size=(rows, 2)).astype(np.float32)
    codec: Any = SimpleNamespace(decode=lambda ids: "x")
    corpus: Any = SimpleNamespace(utility=None)
    context: Any = SimpleNamespace(tokenize=lambda codec, rows: ([Example((1,), ()) for _ in rows], None))
    settings: Any = SimpleNamespace(split=Split(), samples_once=False)
    pairs, prompts = Artifact(folder, {}), ["p"] * rows

    def write() -> None:
        examples = with_responses([Example((1,), ()) for _ in prompts], samples)
        texts = [(codec.decode(e.responses[0]), codec.decode(e.responses[1])) for e in examples]
        select._table(prompts, texts, examples, scores, None, corpus).write(folder)

    return {
        "select": write,
        "dpo": lambda: dpo._selected(settings, context, codec, pairs),
        "ppo": lambda: ppo._prompts(settings, pairs, context),
    }


def test_ids_pass_through_the_table_and_into_dpo_and_ppo_as_arrays(tmp_path):
    """As lists of ids they took 13 to 14 times their bytes; tests/benchmarks/host_memory.py measures real sizes."""
    for work in made_up(tmp_path, 8, 4).values():  # imports and compiled functions are no ids
        work()
    rows, tokens = 4000, 128
    peaks = {name: peak(work) / (rows * 2 * tokens * 4) for name, work in made_up(tmp_path, rows, tokens).items()}
    # a row's views and tuples take some 700 bytes, as many as two thirds of its ids
    assert peaks["select"] < 4 and peaks["dpo"] < 4 and peaks["ppo"] < 0.5, peaks
