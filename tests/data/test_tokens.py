"""mpo_jax.data.tokens: rows to examples and counts, and a cache that never changes either."""

import itertools
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.config.schema import TextConfig
from mpo_jax.data import tokens, toy
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, TokenReport, number_visits, tokenize
from mpo_jax.models.hf.tokenizer import load_tokenizer

LIMITS = TextConfig(max_prompt_tokens=3, max_response_tokens=4)
ROWS = [
    (" my boss", (" should i quit", " my boss")),  # fits exactly, EOS included
    (" my boss should i quit", (" should i quit now", " my boss, my boss")),  # all cut: one prompt, one row
    (" my boss", ("", " my boss")),
]


def codec(config: TextConfig = LIMITS) -> TextCodec:
    return TextCodec(toy.make_tokenizer(), config)


def plain(examples: list[Example]) -> list[tuple[list[int], list[list[int]]]]:
    return [([int(i) for i in e.prompt], [[int(i) for i in ids] for ids in e.responses]) for e in examples]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def counting(monkeypatch) -> list[str]:
    """Every text that is tokenized from here on."""
    seen: list[str] = []
    for name in ("prompts", "responses"):
        original = getattr(TextCodec, name)
        monkeypatch.setattr(TextCodec, name, lambda self, texts, f=original: seen.extend(texts) or f(self, texts))
    return seen


def test_a_key_depends_on_the_prompts_ids_alone():
    key = Example([5, 6, 7], [[1]]).key
    assert key == Example(np.asarray([5, 6, 7], np.int32), [[2], [3]]).key == Example(np.asarray([5, 6, 7]), []).key
    assert 0 <= key < 2**32
    assert len({Example(list(ids), []).key for n in range(4) for ids in itertools.product(range(6), repeat=n)}) == 259
    assert Example([1, 2], []).key == 0x34FB5C82  # sha256 of two little-endian int32; samples depend on it


def test_every_visit_of_a_prompt_has_a_key_of_its_own():
    prompts = [[5, 6], [7], [5, 6], [5, 6], [8], [7]]
    numbered = number_visits([Example(ids, []) for ids in prompts])
    assert [example.visit for example in numbered] == [0, 0, 1, 2, 0, 1]
    assert len({example.key for example in numbered}) == 6
    # a prompt's first visit draws what it drew when it came once
    assert [example.key for example in numbered if not example.visit] == [
        Example(ids, []).key for ids in ([5, 6], [7], [8])
    ]
    assert len({Example([5, 6], [], visit=visit).key for visit in range(50000)}) == 50000
    assert all(0 <= Example([5, 6], [], visit=visit).key < 2**32 for visit in (1, 2, 10**6))


def test_tokenize_counts_what_it_cuts():
    examples, report = tokenize(codec(), ROWS)
    assert report == TokenReport(
        rows=3,
        truncated_prompts=1,
        truncated_responses=1,
        empty_responses=[3],
        prompt_tokens={"p50": 2, "p90": 5, "p99": 5, "max": 5},
        response_tokens={"p50": 3, "p90": 6, "p99": 6, "max": 6},
    )
    plain_report = json.loads(json.dumps(report.to_dict()))
    assert plain_report["response_tokens"]["max"] == 6
    assert (plain_report["equal_responses"], plain_report["empty_responses"]) == (0, 1)
    assert [[len(e.prompt), *map(len, e.responses)] for e in examples] == [[2, 4, 3], [3, 4, 4], [2, 1, 3]]
    eos = codec().eos_id
    assert [[ids[-1] == eos for ids in e.responses] for e in examples] == [[True] * 2, [False] * 2, [True] * 2]


def test_pairs_that_are_equal_once_cut_are_found():
    long = " should i quit now my boss"
    rows = [
        (" my", (long, f"{long} too")),
        (" my", (" a", " a")),
        (" my", (" no", " quit")),
        (" my", (long, long + long)),
        (" my", (" \u4f60", " \u597d")),
    ]
    report = tokenize(codec(), rows)[1]
    assert report.equal_responses == [1, 4]  # equal texts are another matter
    assert report.indistinct_responses == [5]  # both are the token for what the tokenizer does not know
    said, unknown = report.findings("pairs", 4)
    assert said.startswith("2 of 5 pairs have equal sides once they are cut to text.max_response_tokens=4")
    assert said.endswith("Rows of the set: 1, 4")
    assert unknown.startswith("1 of 5 pairs have sides that the tokenizer writes with the same tokens")
    assert unknown.endswith("Rows of the set: 5")
    many = TokenReport(rows=9, empty_responses=[*range(1, 9)])
    assert many.findings("pairs", 4)[0].endswith("Rows of the set: 1, 2, 3, 4, 5 and 3 more")
    assert TokenReport(rows=9).findings("pairs", 4) == []


def test_percentiles_are_lengths_that_occur():
    rows = [(" my" * n, (" boss" * (2 * n),)) for n in range(1, 101)]
    report = tokenize(codec(TextConfig()), rows)[1]
    assert report.prompt_tokens == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert report.response_tokens == {"p50": 101, "p90": 181, "p99": 199, "max": 201}
    repeated = tokenize(codec(TextConfig()), [(" my", ()), *[(" my boss", ())] * 9])[1]
    assert repeated.prompt_tokens == {"p50": 2, "p90": 2, "p99": 2, "max": 2}


def test_no_rows_and_no_responses():
    assert tokenize(codec(), []) == ([], TokenReport())
    examples, report = tokenize(codec(), [(" my boss", ())])
    assert plain(examples) == [(codec().prompt(" my boss").ids, [])]
    assert (report.rows, report.truncated_responses, report.response_tokens) == (1, 0, {})


@given(
    st.lists(
        st.tuples(
            st.sampled_from([" my", " my boss", " should i quit"]),
            st.lists(st.sampled_from(toy.RAMBLES), max_size=3).map(tuple),
        )
    )
)
def test_examples_are_the_codecs_ids(rows):
    examples, report = tokenize(codec(), rows)
    each = [(codec().prompt(p).ids, [codec().response(r).ids for r in rs]) for p, rs in rows]
    assert plain(examples) == each
    assert report.truncated_responses == sum(any(codec().response(r).truncated for r in rs) for _, rs in rows)


def test_equal_prompts_are_tokenized_once_and_share_their_ids(monkeypatch):
    seen = counting(monkeypatch)
    monkeypatch.setattr(tokens, "CHUNK_TEXTS", 2)
    examples, _ = tokenize(codec(), ROWS)
    assert seen == [" my boss", " my boss should i quit", *(r for _, responses in ROWS for r in responses)]
    assert np.shares_memory(examples[0].prompt, examples[2].prompt)


def test_ids_are_read_only_views_into_one_array(tmp_path):
    for _ in range(2):  # made, then read
        examples, _ = tokenize(codec(), ROWS, cache=tmp_path)
        arrays = [ids for e in examples for ids in (e.prompt, *e.responses) if isinstance(ids, np.ndarray)]
        assert len(arrays) == 9
        assert {a.dtype for a in arrays} == {np.dtype(np.int32)} and len({id(a.base) for a in arrays}) == 1
        with pytest.raises(ValueError, match="read-only"):
            arrays[0][0] = 7


# cache


def test_a_hit_gives_the_same_examples_and_report_without_tokenizing(tmp_path, monkeypatch):
    made = tokenize(codec(), ROWS, cache=tmp_path / "new" / "folder")
    seen = counting(monkeypatch)
    read = tokenize(codec(), ROWS, cache=tmp_path / "new" / "folder")
    assert seen == []
    assert plain(read[0]) == plain(made[0]) == plain(tokenize(codec(), ROWS)[0])
    assert read[1] == made[1]
    assert len(files(tmp_path / "new" / "folder")) == 1


OTHER_ROWS = {
    "text": [(" my boss", (" should i quit", " my boss.")), *ROWS[1:]],
    "prompt": [(" my keys", ROWS[0][1]), *ROWS[1:]],
    "order": [ROWS[1], ROWS[0], ROWS[2]],
    "fewer": ROWS[:2],
    "a response less": [*ROWS[:2], (" my boss", ("",))],
    "swapped": [(ROWS[0][0], ROWS[0][1][::-1]), *ROWS[1:]],
    "the same characters in other texts": [(" my bos", ("s should i quit", " my boss")), *ROWS[1:]],
    "the same texts in other rows": [(" my boss", (" should i quit", " my boss", " my boss should i quit")),
                                     (" should i quit now", (" my boss, my boss",)), ROWS[2]],
    "none": [],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_rows_miss(tmp_path, name):
    tokenize(codec(), ROWS, cache=tmp_path)
    examples, report = tokenize(codec(), OTHER_ROWS[name], cache=tmp_path)
    assert len(files(tmp_path)) == 2
    fresh = tokenize(codec(), OTHER_ROWS[name])
    assert (plain(examples), report) == (plain(fresh[0]), fresh[1])


@pytest.mark.parametrize(
    "option",
    [
        {"max_prompt_tokens": 2}, {"max_response_tokens": 3}, {"prompt_template": "{prompt} my"},
        {"truncation": "start"},
    ],
)  # fmt: skip
def test_another_text_option_misses(tmp_path, option):
    tokenize(codec(), ROWS, cache=tmp_path)
    changed = codec(LIMITS.model_copy(update=option))
    examples, report = tokenize(changed, ROWS, cache=tmp_path)
    assert len(files(tmp_path)) == 2
    assert (plain(examples), report) == (plain(tokenize(changed, ROWS)[0]), tokenize(changed, ROWS)[1])


def test_another_tokenizer_or_version_misses(tmp_path, shared_data, monkeypatch):
    tokenize(codec(), ROWS, cache=tmp_path)
    stories = TextCodec(load_tokenizer(shared_data / "models" / "stories260K"), LIMITS)
    assert plain(tokenize(stories, ROWS, cache=tmp_path)[0]) == plain(tokenize(stories, ROWS)[0])
    larger = toy.make_tokenizer()
    larger.add_tokens(["boss"])
    tokenize(TextCodec(larger, LIMITS), ROWS, cache=tmp_path)
    assert len(files(tmp_path)) == 3
    for number, (module, name) in enumerate([(tokens, "FORMAT"), (tokens.tokenizers, "__version__")]):
        monkeypatch.setattr(module, name, "another")
        tokenize(codec(), ROWS, cache=tmp_path)
        assert len(files(tmp_path)) == 4 + number


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "no zip":
        path.write_bytes(b"something else" * 100)
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        with np.load(path) as file:
            place = data.index(file["ids"].tobytes())
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "pickle":
        np.savez(path, ids=np.asarray([{}], object), length=np.zeros(1), full=np.zeros(1))
    else:
        with np.load(path) as file:
            arrays = dict(file)
        if how == "an array less":
            del arrays["full"]
        elif how == "ids less":
            arrays["ids"] = arrays["ids"][:-1]
        elif how == "a text less":
            arrays = {"ids": arrays["ids"][: -arrays["length"][-1]], **{k: arrays[k][:-1] for k in ("length", "full")}}
        elif how == "negative":
            arrays["length"][:2] += np.asarray([-9, 9], np.int32)
            arrays["full"] += 9
        elif how == "longer than before cutting":
            arrays["full"][:] = 0
        elif how == "another type":
            arrays = {name: array.astype(np.int64) for name, array in arrays.items()}
        np.savez(path, **arrays)


@pytest.mark.parametrize(
    "how",
    [
        "empty", "no zip", "cut", "flipped", "pickle", "an array less", "ids less", "a text less", "negative",
        "longer than before cutting", "another type",
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_miss_and_is_made_anew(tmp_path, how, monkeypatch):
    made = tokenize(codec(), ROWS, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path, how)
    assert path.read_bytes() != whole
    again = tokenize(codec(), ROWS, cache=tmp_path)
    assert (plain(again[0]), again[1]) == (plain(made[0]), made[1])
    assert path.read_bytes() == whole
    seen = counting(monkeypatch)
    assert plain(tokenize(codec(), ROWS, cache=tmp_path)[0]) == plain(made[0])
    assert seen == [] and files(tmp_path) == [path.name]


@given(data=st.data())
def test_any_damage_changes_no_example(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    made = tokenize(codec(), ROWS, cache=folder)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    again = tokenize(codec(), ROWS, cache=folder)
    assert (plain(again[0]), again[1]) == (plain(made[0]), made[1])


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch):
    expected = plain(tokenize(codec(), ROWS)[0])
    (tmp_path / "file").write_text("")
    assert plain(tokenize(codec(), ROWS, cache=tmp_path / "file" / "folder")[0]) == expected
    tokenize(codec(), ROWS, cache=tmp_path / "taken")
    (path,) = (tmp_path / "taken").iterdir()
    damage(path, "a folder")
    assert plain(tokenize(codec(), ROWS, cache=tmp_path / "taken")[0]) == expected

    def full(path, **arrays):
        Path(path).write_bytes(b"the first part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens.np, "savez", full)
    assert plain(tokenize(codec(), ROWS, cache=tmp_path / "full")[0]) == expected
    assert files(tmp_path / "full") == []


def test_a_run_killed_while_writing_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize(codec(), ROWS, cache=tmp_path)
    assert not list(tmp_path.glob("*.npz"))
    made = tokenize(codec(), ROWS, cache=tmp_path)
    assert plain(tokenize(codec(), ROWS, cache=tmp_path)[0]) == plain(made[0])


def _tokenize_often(folder: str, start, results) -> None:
    rows = [(f" my boss{' should' * (i % 5)}", (" quit" * (i % 7),)) for i in range(400)]
    maker = codec()
    start.wait()
    for _ in range(5):
        examples, report = tokenize(maker, rows, cache=Path(folder))
        for path in Path(folder).glob("*.npz"):
            path.unlink(missing_ok=True)
        results.put((plain(examples), report.to_dict()))


@pytest.mark.thorough
def test_two_processes_at_once_agree(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=_tokenize_often, args=(str(tmp_path), start, results)) for _ in range(2)]
    for process in both:
        process.start()
    first, *others = [results.get(timeout=120) for _ in range(10)]
    for process in both:
        process.join(timeout=60)
    assert [process.exitcode for process in both] == [0, 0]
    assert all(other == first for other in others)
    assert not [name for name in files(tmp_path) if not name.endswith(".npz")]


def test_the_cache_is_near_four_bytes_a_token(tmp_path):
    rows = [(" my boss" * 100 + f" {' quit' * i}", (" should" * 100,)) for i in range(100)]
    examples, _ = tokenize(codec(TextConfig(max_prompt_tokens=300)), rows, cache=tmp_path)
    total = sum(len(ids) for e in examples for ids in (e.prompt, *e.responses))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 4.1 * total + 2000
