"""`mpo plan` through the command line, for simulated CPU devices."""

import json

import pytest

from tests.pipeline.test_pipeline import MICRO, mpo

SMALL = ("model.architecture.num_layers=1", "--stage", "evaluate,dpo")


@pytest.fixture(scope="module")
def tight(tmp_path_factory) -> tuple[int, dict]:
    """A plan for devices of one megabyte."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    status = mpo("plan", MICRO, *SMALL, "--on", "cpu:0.001", "--json", file)
    return status, json.loads(file.read_text())


@pytest.mark.thorough
def test_status_3_where_something_does_not_fit(tight):
    status, plan = tight
    assert status == 3
    assert {p["stage"] for p in plan["programs"]} == {"evaluate", "dpo"}
    assert {p["fits"] for p in plan["programs"]} == {True, False}
    for program in plan["programs"]:
        assert program["fits"] == (program["peak"] <= program["usable"])
        assert bool(program["advice"]) != program["fits"]


def test_json_has_every_number(tight):
    _, plan = tight
    assert (plan["target"], plan["devices"], plan["upper_bound"], plan["device"]) == ("cpu:0.001", 1, True, None)
    for program in plan["programs"]:
        parts = program["memory"]
        assert program["peak"] == sum(parts.values()) and min(parts.values()) >= 0
        assert (program["flops"] > 0) != program["name"].endswith("weights") and program["estimate_s"] is None
    step = next(p for p in plan["programs"] if p["name"] == "dpo step")
    assert step["collectives"] == []
    assert plan["config"]["sft"]["train"]["batch_size"] == 16


def test_mistakes_have_status_2(capfd):
    assert mpo("plan", MICRO, "--on", "a1000x8") == 2
    assert "did you mean a100?" in capfd.readouterr().err
    assert mpo("plan", MICRO) == 2
    assert mpo("plan", MICRO, "--on", "cpu", "--stage", "sft,rpo") == 2
    assert "--stage rpo: no such stage; there are sft, reward" in capfd.readouterr().err
