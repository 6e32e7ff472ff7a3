"""`mpo table` on the micro configuration: what is planned, what is made once, what is written, and what goes on."""

import csv
import json
import re
from pathlib import Path

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.data import toy
from mpo_jax.data.pair_table import PairTable
from mpo_jax.data.text import TextCodec
from mpo_jax.evaluation.calibration import read_gaps
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.pipeline.table import TableStage
from mpo_jax.types import trainable
from tests.models.tiny import random_params
from tests.pipeline.test_pipeline import MICRO, mpo

pytestmark = pytest.mark.thorough

RUNS = "experiment=sft,ppo,mpo"
# micro gaps lie around a few hundredths: no pair is easy at 50
SPLITS = "table.thresholds=[0.01,50]"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workdir for two seeds, before anything is made, and what the dry run says."""
    workdir = tmp_path_factory.mktemp("table") / "work"
    return workdir, dry_run(workdir)


def dry_run(workdir: Path) -> str:
    from mpo_jax.runtime.console import console

    with console.capture() as captured:
        assert mpo("table", str(MICRO), f"workdir={workdir}", RUNS, SPLITS, "seeds=0,1", "--dry-run") == 0
    return captured.get()


@pytest.fixture(scope="module")
def made(planned: tuple[Path, str]) -> tuple[Path, str]:
    """The same table made, and what was printed."""
    from mpo_jax.runtime.console import console

    workdir, _ = planned
    with console.capture() as captured:
        assert mpo("table", str(MICRO), f"workdir={workdir}", RUNS, SPLITS, "seeds=0,1") == 0
    return workdir, captured.get()


def test_a_dry_run_makes_nothing_and_names_every_stage(planned: tuple[Path, str]) -> None:
    workdir, text = planned
    assert not workdir.exists() or not list(workdir.rglob("stages"))
    # a seed: sft, reward, selection, 5 evaluations, ppo, and two steps for each of three splits
    assert "30 stages: 0 there already, 30 to make" in text
    (sft,) = set(re.findall(r"sft-\w+  \[(.*)\]", text))
    assert sft == "sft, ppo, mpo, mpo_t0.01, mpo_t50"
    assert "roughly" in text and re.search(
        r"about .* to go, without compilation \(30 of them by counted arithmetic", text
    )


def test_stages_are_made_under_the_names_that_the_dry_run_gave(
    planned: tuple[Path, str], made: tuple[Path, str]
) -> None:
    workdir, text = planned[0], planned[1]
    named = set(re.findall(r"\b((?:sft|reward|select|dpo|ppo|evaluate)-[0-9a-f]{12})  ?[\[<]", text))
    there = {path.parent.name for path in made[0].glob("seed-*/stages/*/manifest.json")}
    missing = named - there
    assert there < named
    # the run without an easy pair lacks its own three stages, for each seed
    assert sorted(name.partition("-")[0] for name in missing) == ["dpo", "dpo", "evaluate", "evaluate", "ppo", "ppo"]
    after = dry_run(workdir)
    assert "30 stages: 24 there already, 6 to make" in after
    # what shares nothing with a finished stage is still estimated by arithmetic
    assert after.count("\n  there, ") == 24


def test_a_run_that_cannot_be_made_is_left_out_and_named(made: tuple[Path, str]) -> None:
    workdir, text = made
    assert "mpo_t50 is left out: no pair is easy at threshold 50" in text
    runs = {path.name for path in (workdir / "seed-1" / "runs").iterdir()}
    assert runs == {"sft", "ppo", "mpo", "mpo_t0.01"}
    everything = (workdir / "tables" / "all.md").read_text(encoding="utf-8")
    assert "mpo_t50, seed 0 was left out: no pair is easy" in everything


def test_the_report_s_command_writes_tables_and_figures_again(made: tuple[Path, str]) -> None:
    """Whatever came since, as verdicts do; what was left out stays named."""
    workdir, _ = made
    files = [path for name in ("tables", "figures") for path in (workdir / name).iterdir()]
    before = {path: path.read_bytes() for path in files}
    for path in files:
        path.unlink()
    assert mpo("report", str(workdir)) == 0
    assert {path: path.read_bytes() for name in ("tables", "figures") for path in (workdir / name).iterdir()} == before


def test_splits_share_all_that_does_not_depend_on_them(made: tuple[Path, str]) -> None:
    runs = made[0] / "seed-0" / "runs"
    for role in ("sft", "reward", "select"):
        assert (runs / "mpo" / role).resolve() == (runs / "mpo_t0.01" / role).resolve()
    assert (runs / "mpo" / "1-dpo").resolve() != (runs / "mpo_t0.01" / "1-dpo").resolve()
    table = PairTable.read(runs / "mpo_t0.01" / "select")
    trained = json.loads((runs / "mpo_t0.01" / "1-dpo" / "manifest.json").read_text())["summary"]["pairs"]
    assert trained == (table.gap > 0.01).sum()


def test_progress_counts_the_whole_table(made: tuple[Path, str]) -> None:
    _, text = made
    found = [(int(a), int(b)) for a, b in re.findall(r"table: stage (\d+) of (\d+), ETA", text)]
    # the split without an easy pair has left the count for seed 0, and for seed 1 is not yet known to
    assert found[0] == (1, 30) and found[-1] == (24, 27)
    assert [number for number, _ in found] == sorted(number for number, _ in found)


def test_tables_and_figures_are_files(made: tuple[Path, str]) -> None:
    workdir, text = made
    tables, figures = workdir / "tables", workdir / "figures"
    names = {path.stem for path in tables.glob("*.csv")}
    assert names >= {
        "seeds", "by_seed", "claims", "table1", "table2", "table3", "table4", "table5", "table6", "figure2",
        "reliability", "calibration_error", "thresholds",
    }  # fmt: skip
    assert {path.stem for path in tables.glob("*.md")} >= {"all", "claims", "table3"}
    claims = rows_of(tables / "claims.csv")
    assert {row["claim"] for row in claims} == {
        "MPO better than PPO, 50% easy", "MPO better than PPO, threshold 0.01",
    }  # fmt: skip
    assert {row["measure"] for row in claims} == {"reward", "true utility"}
    for row in claims:
        assert row["verdict"] in ("supported", "contradicted", "undecided") and row["seeds"] == "2"
    assert "Holm-adjusted p-value is below 0.05" in text and "2 seeds: each seed has test prompts of its own" in text
    three = {row["run"]: row for row in rows_of(tables / "table3.csv")}
    assert list(three) == ["sft", "ppo", "mpo", "mpo_t0.01"] and three["ppo"]["paper_hh"] == "2.513"
    images = {path.stem for path in figures.glob("*.png")}
    assert images == {path.stem for path in figures.glob("*.csv")}
    assert images >= {"claims", "reward_against_kl", "utility_against_kl", "reliability", "over_optimisation"}
    assert not list(workdir.rglob(".*.tmp"))


def test_over_optimisation_follows_ppo_by_update(made: tuple[Path, str]) -> None:
    rows = rows_of(made[0] / "figures" / "over_optimisation.csv")
    ppo = [row for row in rows if row["series"] == "ppo"]
    assert [row["step"] for row in ppo] == ["1", "2", "3"]
    logged = [json.loads(line) for line in (made[0] / "seed-0/runs/ppo/1-ppo/metrics.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (made[0] / "seed-1/runs/ppo/1-ppo/metrics.jsonl").read_text().splitlines()]
    means = [(a["objective/utility"] + b["objective/utility"]) / 2 for a, b in zip(logged, other, strict=True)]
    assert [float(row["utility"]) for row in ppo] == pytest.approx(means)


def test_a_second_call_makes_nothing(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    workdir, _ = made
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("seed-*/stages/*/manifest.json")}
    # the old form of the command
    assert mpo("table", str(MICRO), f"workdir={workdir}", RUNS, "table.thresholds=[0.01]", "--seeds", "0,1") == 0
    assert before == {path: path.stat().st_mtime_ns for path in workdir.glob("seed-*/stages/*/manifest.json")}
    out = capsys.readouterr().out
    assert "24 stages: 24 there already, 0 to make" in out and "seed 1: 0 stages made" in out


def test_the_report_is_of_the_whole_table(made: tuple[Path, str]) -> None:
    page = (made[0] / "report" / "index.html").read_text(encoding="utf-8")
    assert "seeds 0, 1" in page and "mpo table" in page and "table.yaml" in page
    assert page.count("<section") == 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "one"], ["table.seeds", "integer"]),
        (["seeds=1,1"], ["different whole numbers"]),
        (["seeds=-1"], ["different whole numbers"]),
        (["experiment=grpo"], ["table.experiment", "grpo"]),
        (["table.easy_fractions=[1.5]"], ["easy_fractions", "[0, 1]"]),
        (["seed=5"], ["seed=5", "give seeds=5"]),
        (["seeds="], ["table.seeds", "should be a list", "given: nothing"]),
    ],
)
def test_mistakes_are_messages(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mpo("table", str(MICRO), f"workdir={tmp_path / 'w'}", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    assert all(word in error for word in words), error
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("place", "content", "words"),
    [
        ("seed-1", "", "seed-1 is a file: name a folder"),
        ("tables", "", "tables is a file: name a folder"),
        ("judge/result.json", "{}", "no result of mpo judge"),
    ],
)
def test_what_is_in_the_way_is_found_before_any_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, content: str, words: str
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(content)
    assert mpo("table", str(MICRO), f"workdir={tmp_path}", "seeds=0,1", "experiment=sft") == 2
    captured = capsys.readouterr()
    assert words in captured.err and "make sft" not in captured.out and not (tmp_path / "seed-0").exists()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A table of two seeds on rows from a file that share SFT and reward model, and what was printed."""
    from mpo_jax.runtime.console import console

    folder = tmp_path_factory.mktemp("shared")
    config = load_config(MICRO)
    codec = TextCodec(toy.make_tokenizer(), config.text)
    decoder = loading.scratch_sizes(config.model.architecture, codec.vocab_size)
    loading.save(folder / "policy", Model(decoder), trainable(random_params(decoder)), codec.tokenizer)
    words = ["my boss", "my dog", "the car", "a friend", "my mother", "the job", "a house", "my name"] * 4
    rows = [{"prompt": f"{word} {n}", "chosen": f" {word}", "rejected": " no"} for n, word in enumerate(words)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("data.kind=pairs", f"data.path={folder}/rows.jsonl", "data.validation_fraction=0.3")
    given = (*data, f"model.path={folder}/policy", "sft.seed=0", "reward.seed=0", "experiment=sft,dpo_base")
    with console.capture() as captured:
        assert mpo("table", str(MICRO), f"workdir={folder}/work", *given, "seeds=0,1") == 0
    return folder / "work", captured.get()


def test_seeds_can_share_sft_and_reward_model(shared: tuple[Path, str]) -> None:
    workdir, text = shared
    assert "8 stages: 0 there already, 8 to make" in text and "stage 8 of 8" in text
    assert "seed 0: 5 stages made, 0 reused" in text and "seed 1: 3 stages made, 2 reused" in text
    runs = [workdir / f"seed-{seed}" / "runs" / "dpo_base" for seed in (0, 1)]
    for role in ("sft", "reward"):
        first, second = ((run / role).resolve() for run in runs)
        assert first.name == second.name and first != second
        weights = [sorted((one / "model").glob("*.safetensors")) for one in (first, second)]
        assert [a.samefile(b) for a, b in zip(*weights, strict=True)] == [True]
    assert (runs[0] / "1-dpo").resolve().name != (runs[1] / "1-dpo").resolve().name


def test_what_later_seeds_take_stays_until_the_last(shared: tuple[Path, str], tmp_path: Path) -> None:
    """Without a run `sft`, whose policy stays anyway, and with `runtime.keep=last`."""
    from mpo_jax.runtime.console import console

    folder = shared[0].parent
    data = ("data.kind=pairs", f"data.path={folder}/rows.jsonl", "data.validation_fraction=0.3")
    given = (*data, f"model.path={folder}/policy", "sft.seed=0", "reward.seed=0", "experiment=dpo_base")
    with console.capture() as captured:
        assert mpo("table", str(MICRO), f"workdir={tmp_path}", *given, "seeds=0,1", "runtime.keep=last") == 0
    assert "seed 1: 2 stages made, 2 reused" in (text := captured.get()) and "is made again" not in text
    assert [path.parent.name.partition("-")[0] for path in sorted(tmp_path.glob("seed-*/stages/*/model"))] == [
        "dpo", "reward", "dpo", "reward"
    ]  # fmt: skip


def test_what_seeds_share_is_said_where_intervals_are(shared: tuple[Path, str]) -> None:
    workdir, _ = shared
    said = "All seeds share one SFT model and one reward model: what others would give is in no interval or error here."
    assert said in (workdir / "tables" / "all.md").read_text(encoding="utf-8")
    assert said in (workdir / "report" / "index.html").read_text(encoding="utf-8")
    # the one reward model's held-out pairs count once
    accuracy, longer = rows_of(workdir / "tables" / "table2.csv")
    # "no" against longer words: every chosen response is the longer one
    assert (longer["agreement"], longer["accuracy"]) == ("labels, by the longer response", "1.0")
    gaps, _ = read_gaps(workdir / "seed-0" / "runs" / "sft" / "reward") or pytest.fail("no gaps")
    assert accuracy["seeds"] == "1" and int(accuracy["pairs"]) == len(gaps) > 0


def test_planned_stages_know_whether_they_are_there() -> None:
    recipe = {"stage": "dpo", "parents": {}}
    assert not TableStage(0, "dpo-1", recipe, ("dpo", "1-dpo"), ["dpo"], None).is_there
    assert TableStage(0, "dpo-1", recipe, ("dpo", "1-dpo"), ["dpo"], 0.0).is_there
