"""mpo_jax.data.corpus: sets too small to hold rows out, and rows that are meant to train and to test."""

import re

import pytest

from mpo_jax.config.schema import Config, DataConfig
from mpo_jax.data.corpus import check_first_rows
from mpo_jax.errors import UserError
from mpo_jax.runtime.stage_warnings import collect_warnings
from tests.data.test_corpus import load_corpus, pairs, write


def test_a_set_too_small_to_hold_rows_out_trains_and_is_not_evaluated(tmp_path):
    data = DataConfig(kind="pairs", path=write(tmp_path / "b.jsonl", pairs(0, 20)), validation_fraction=1e-5)
    expected = r"data\.validation_fraction=1e-05 of 20 prompts holds out no row: .* Raise it, such as to 0\.2, or name"
    with collect_warnings() as warnings:
        assert len(load_corpus(data).pairs) == 20
    assert re.match(expected, warnings[0]) and len(warnings) == 1


def test_rows_that_train_and_test_are_said(tmp_path):
    path, copied = (write(tmp_path / name, pairs(0, 20)) for name in ("a.jsonl", "copy.jsonl"))
    same = DataConfig(kind="pairs", path=path, test_path=path)
    with pytest.raises(UserError, match=r"data\.path and data\.test_path both name .*a\.jsonl: .*validation_fraction"):
        check_first_rows(Config(data=same))
    with pytest.raises(UserError, match=r"data\.path and the test set hold the same prompts: name other rows"):
        load_corpus(same.model_copy(update={"test_path": (copied,)}))
    more = write(tmp_path / "more.jsonl", pairs(0, 30))
    with collect_warnings() as warnings:
        load_corpus(DataConfig(kind="pairs", path=more, test_path=path))
    assert warnings == [
        "20 of 30 training rows have prompts of the test set and are left out: check that data.path and data.test_path "
        "name different rows"
    ]
