"""mpo.read_pairs and the others: columns of other names, end markers, and options that are refused."""

import pytest

import mpo_jax as mpo
from mpo_jax.data import toy
from mpo_jax.errors import UserError

ROWS = [{"q": "my boss", "chosen": " a<|im_end|>", "rejected": " b"}]
COLUMNS = {"prompt": "q"}


def test_columns_and_end_markers(capsys):
    tokenizer = toy.make_tokenizer()
    pairs = mpo.read_pairs(ROWS, tokenizer, columns=COLUMNS)
    assert (pairs.prompts, pairs.responses) == (["my boss"], [(" a", " b")])
    assert "1 response ends with a special token, such as <|im_end|> as text, which is stripped" in (
        " ".join(capsys.readouterr().out.split())
    )
    kept = mpo.read_pairs(ROWS, tokenizer, columns=COLUMNS, end_markers="keep")
    assert kept.responses == [(" a<|im_end|>", " b")]
    shown = mpo.read_demonstrations(ROWS, tokenizer, columns={**COLUMNS, "response": "chosen"})
    assert shown.responses == [(" a",)]
    assert mpo.read_prompts(ROWS, tokenizer, columns=COLUMNS).prompts == ["my boss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"prompt": "p"}}, r"data\.columns\.prompt=p: the first rows have no column 'p'; they have: q"),
        ({"columns": {"promt": "q"}}, r"data\.columns\.promt: rows have no such field; did you mean prompt\?"),
        ({"columns": {"prompt": True}}, "columns: the column for prompt was read as true"),
        ({"end_markers": "drop"}, "end_markers: Input should be 'strip' or 'keep'"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        mpo.read_pairs([{"q": "a", "chosen": "b", "rejected": "c"}], toy.make_tokenizer(), **options)


def test_a_missing_field_is_named_with_the_option_that_finds_it():
    with pytest.raises(UserError, match=r"row 1: .*no field 'rejected'.*\. columns=.*rejected.* takes it from"):
        mpo.read_pairs([{"prompt": "a", "chosen": "b", "worse": "c"}], toy.make_tokenizer())
