"""tests.covering: what a default run leaves out is no value of any axis."""

import itertools

from tests import covering


def test_every_value_comes_and_with_every_case_every_pair(monkeypatch):
    axes = "abcd", (1, 2, 3), (True,)
    monkeypatch.setattr(covering, "EVERY_CASE", False)
    few = covering.covering(*axes)
    assert len(few) == 4 and [set(values) for values in zip(*few, strict=True)] == [set(axis) for axis in axes]
    monkeypatch.setattr(covering, "EVERY_CASE", True)
    assert covering.covering(*axes) == list(itertools.product(*axes))
