"""`mpo data`: the counts, and rows as the model gets them."""

import json

import pytest

from mpo_jax.cli import data
from mpo_jax.config.load import load_config
from mpo_jax.config.schema import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import tokenize
from mpo_jax.tools.data_files import FILES
from tests.pipeline.test_pipeline import mpo


@pytest.fixture
def config(language_model, tmp_path):
    rows = [
        {"prompt": f"my boss lost the keys {'too' * n}", "chosen": " should i quit", "rejected": " my uncle" * (n + 1)}
        for n in range(30)
    ]
    rows += [
        {"prompt": "my sister", "chosen": " no", "rejected": " no"},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{path: {language_model}}}\n"
        f"data: {{kind: pairs, path: {tmp_path / 'rows.jsonl'}, validation_fraction: 0.3}}\n"
        "text: {max_prompt_tokens: 8, max_response_tokens: 20}\nruntime: {token_cache: null}\n"
    )
    return path


def test_counts_and_rows(config, capsys, monkeypatch):
    monkeypatch.setattr(data.console, "width", 200)
    assert mpo("data", str(config), "--examples", "3") == 0
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    counts = {row[0]: row[1:] for row in cells}
    assert next(row[1:3] for row in cells if row[0].endswith("rows.jsonl")) == ["32", "30"]
    assert "1: chosen equals rejected" in shown and "1: empty prompt" in shown
    training, held_out = int(counts["pairs"][0]), int(counts["held out"][0])
    assert training + held_out == 30 and 3 < held_out < 20
    assert int(counts["demonstrations"][0]) == int(counts["prompts"][0]) == training
    assert int(counts["reward model's pairs"][0]) == training
    assert int(counts["validation"][0]) == int(counts["test prompts"][0]) == held_out
    assert f"{training} prompts to sample from ({training} distinct)" in shown and "(data.prompts=rows)" in shown
    # " should i quit<eos>" is four tokens in every row; the rejected side has up to sixty-one
    assert counts["demonstrations"][3:] == ["4/4/4/4", "0"]
    assert int(counts["pairs"][4]) > 0 and counts["pairs"][3].startswith("4/")
    assert shown.count("demonstrations, row") == shown.count("pairs, row") == 3
    assert "response: " in shown and "\u2039 should\u203a\u2039 i\u203a\u2039 quit\u203a\u2039<eos>\u203a" in shown


def test_sets_are_files_that_make_the_same_sets_again(config, tmp_path, capsys):
    """For every kind of row: plain text, and conversations with a category."""
    rows = [
        {"prompt": [{"role": "user", "content": f"my boss {n}"}], "chosen": " should i quit",
         "rejected": " my uncle", "category": f"c{n % 2}"}
        for n in range(20)
    ]  # fmt: skip
    turns = tmp_path / "turns.jsonl"
    turns.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ("text.chat_template=" + str(tmp_path / "chat.jinja"), f"data.path={turns}")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    for number, given in enumerate([(), chat]):
        out = tmp_path / f"out{number}"
        assert mpo("data", str(config), *given, "--export", out) == 0
        shown = capsys.readouterr().out
        first = load_corpus(load_config(config, given))
        counts = {name: len((out / name).read_text().splitlines()) for name in FILES}
        assert all(f"{name}: {count} row" in shown.replace("\n", "") for name, count in counts.items())
        assert min(counts.values()) > 0 and counts["held_out.jsonl"] == len(first.held_out)
        again = load_corpus(load_config(config, (
            *given, f"data.path={out}/pairs.jsonl", f"data.sft_path={out}/demonstrations.jsonl",
            f"data.test_path={out}/held_out.jsonl", f"data.prompt_path={out}/prompts.jsonl",
            f"data.test_prompt_path={out}/test_prompts.jsonl", "data.validation_fraction=0",
        )))  # fmt: skip
        for name in ("demonstrations", "pairs", "held_out", "prompts", "test_prompts", "categories", "conversations"):
            assert getattr(again, name) == getattr(first, name), name
        assert set(first.categories.values()) == ({"c0", "c1"} if given else set())


def test_files_of_sets_never_take_their_source_s_place(config, tmp_path, capsys):
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").rename(tmp_path / "pairs.jsonl")
    assert mpo("data", str(config), f"data.path={tmp_path}/pairs.jsonl", "--export", tmp_path) == 2
    assert "pairs.jsonl" in capsys.readouterr().err and (tmp_path / "pairs.jsonl").read_text() == rows


def test_the_mask_is_what_is_coloured():
    """Prompt tokens are dim, response tokens green, and special tokens inverted: EOS is in the loss, and shown."""
    codec = TextCodec(toy.make_tokenizer(), TextConfig())
    (example,), _ = tokenize(codec, [(" my boss", (" lost the keys", " my uncle"))])
    text = data._row(codec, example)
    styled = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    by_style = {
        style: [part for part, s in styled if s == style] for style in (data.PROMPT, data.RESPONSE, data.SPECIAL)
    }
    assert by_style[data.PROMPT] == [" my", " boss"]
    assert by_style[data.RESPONSE] == [" lost", " the", " keys", " my", " uncle"]
    assert by_style[data.SPECIAL] == ["<eos>", "<eos>"]


def test_borders_of_tokens_are_no_text_of_theirs():
    """A bar or a line break inside a token cannot be taken for a border."""
    assert data._shown(" a|b\n\tc") == " a|b\\n\\tc"


def test_pairs_that_are_equal_once_cut_are_named(config, capsys, monkeypatch):
    monkeypatch.setattr(data.console, "width", 200)
    (config.parent / "rows.jsonl").write_text(
        json.dumps({"prompt": "my boss", "chosen": " my uncle", "rejected": " my uncle lost the keys"}) + "\n"
    )
    overrides = ("text.max_response_tokens=2", "data.validation_fraction=0")
    assert mpo("data", str(config), *overrides) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 pairs have equal sides once they are cut to text.max_response_tokens=2, and teach nothing" in shown
    assert "Rows of the set: 1" in shown
