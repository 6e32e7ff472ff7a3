"""mpo_jax.data.columns: fields from columns of other names, also on the command line, and names that do not exist."""

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import DataConfig
from mpo_jax.data.corpus import check_first_rows, fingerprint
from mpo_jax.errors import UserError
from tests.data.test_corpus import load_corpus, write

STACK = [{"question": f"q {i}", "response_j": f" j {i}", "response_k": f" k {i}", "prompt": i} for i in range(9)]
COLUMNS = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}


def data_of(path, columns, **more):
    return DataConfig(kind="pairs", path=path, columns=columns, validation_fraction=0, **more)


def test_fields_are_taken_from_the_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", STACK)
    sft = write(tmp_path / "sft.jsonl", [{"question": "q", "completion": " c"}, {"prompt": "p", "completion": " d"}])
    corpus = load_corpus(data_of(path, COLUMNS, sft_path=sft))
    assert [(row.prompt, row.chosen, row.rejected) for row in corpus.pairs[:1]] == [("q 0", " j 0", " k 0")]
    # other paths' rows may call their fields otherwise
    assert [(row.prompt, row.response) for row in corpus.demonstrations] == [("q", " c"), ("p", " d")]
    swapped = load_corpus(data_of(path, {**COLUMNS, "chosen": "response_k", "rejected": "response_j"}))
    assert swapped.pairs[0].chosen == " k 0"


def test_a_misspelt_column_never_leaves_the_prompt_to_what_the_sides_share(tmp_path):
    sides = {"response_j": "Sure:\n 1", "response_k": "Sure:\n 2"}
    path = write(tmp_path / "a.jsonl", [{"question": f"q {i}", **sides} for i in range(3)])
    with pytest.raises(
        UserError, match=r"data\.columns\.prompt=qestion: the first rows have no column 'qestion'.*question"
    ):
        load_corpus(data_of(path, {**COLUMNS, "prompt": "qestion"}))


def test_columns_change_the_fingerprint_and_no_columns_do_not(tmp_path):
    path = write(tmp_path / "a.jsonl", STACK)
    assert fingerprint(data_of(path, COLUMNS)) != fingerprint(data_of(path, {**COLUMNS, "category": "question"}))
    assert fingerprint(data_of(path, {})) == fingerprint(DataConfig(kind="pairs", path=path, validation_fraction=0))


def test_columns_on_the_command_line(tmp_path):
    overrides = ("data.kind=pairs", f"data.path={tmp_path}/a.jsonl", "data.columns.prompt=question")
    assert load_config(None, (*overrides, "data.columns.chosen=a b")).data.columns == (
        ("chosen", "a b"), ("prompt", "question"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"data\.path: .*a\.jsonl:1: field 'prompt' must be a string, not int"),
        (
            {"prompt": "question"},
            r"no field 'chosen'; it has: .*response_j.*\. data\.columns\.chosen=NAME takes",
        ),
        (
            {**COLUMNS, "category": "subjet"},
            r"columns\.category=subjet: the first rows have no column 'subjet'; they",
        ),
        ({**COLUMNS, "promt": "question"}, r"data\.columns\.promt: rows have no such field; did you mean prompt\?"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_read(tmp_path, columns, message):
    path = write(tmp_path / "a.jsonl", STACK)
    with pytest.raises(UserError, match=message):
        check_first_rows(load_config(None, ()).model_copy(update={"data": data_of(path, columns)}))


@pytest.mark.parametrize(("given", "read"), [("yes", "true"), ("2", "2"), ("null", "null")])
def test_a_name_that_yaml_reads_as_something_else_needs_quotes(given, read):
    overrides = ("data.kind=pairs", "data.path=a.jsonl")
    with pytest.raises(UserError) as error:
        load_config(None, (*overrides, f"data.columns.chosen={given}"))
    assert f"data.columns: the column for chosen was read as {read}, which is no name" in str(error.value)
    advised = str(error.value).split("'")[1].replace("NAME", given)
    assert load_config(None, (*overrides, advised)).data.columns == (("chosen", given),)


def test_columns_need_names_and_files(tmp_path):
    with pytest.raises(ValueError, match="a field or its column has no name"):
        data_of(str(tmp_path / "a.jsonl"), {"prompt": ""})
    with pytest.raises(UserError, match=r"names columns of files, and data\.kind=toy reads none"):
        load_config(None, ("data.columns.prompt=question",))
