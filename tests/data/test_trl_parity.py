"""TRL reads exported pairs, and its rendering of their turns is the text that was trained on here.

    python -m pytest -m parity tests/data/test_trl_parity.py

Needs the extra 'parity'. Checked so with TRL 1.12 and 1.16.
"""

import pytest

import mpo_jax as mpo
from tests.data.test_layouts import WITH_TOOLS
from tests.data.test_turns import ANSWERED, CALLED, LONGER, PAIR, SHARED, byte_tokenizer

pytestmark = pytest.mark.parity


def test_trl_renders_exported_turns_as_they_are_read_here(tmp_path):
    datasets, data_utils = pytest.importorskip("datasets"), pytest.importorskip("trl.data_utils")
    tokenizer = byte_tokenizer(WITH_TOOLS)
    pairs = mpo.read_pairs([PAIR, LONGER, CALLED, ANSWERED, SHARED], tokenizer)
    pairs.to_jsonl(tmp_path / "out.jsonl")
    files = {"data_files": str(tmp_path / "out.jsonl"), "cache_dir": str(tmp_path / "cache")}
    for row, prompt, sides in zip(
        datasets.load_dataset("json", split="train", **files), pairs.prompts, pairs.responses, strict=True
    ):
        assert data_utils.is_conversational(row)
        given = {key: row[key] for key in ("prompt", "chosen", "rejected")}
        found = data_utils.maybe_apply_chat_template(given, tokenizer, tools=row["tools"])
        assert found["prompt"] == prompt
        assert [found["chosen"], found["rejected"]] == [f"{side}{tokenizer.eos_token}" for side in sides]
