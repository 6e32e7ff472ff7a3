"""Planted secrets: refused before anything is written, or written and shown nowhere."""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo_jax.cli import exits
from mpo_jax.config import schema
from mpo_jax.config.keys import Key, Part, parts
from mpo_jax.config.load import COMMAND_LINE, load_config, read_record
from mpo_jax.config.schema import Config, DataConfig, ModelConfig, RuntimeConfig, WandbConfig
from mpo_jax.data.sources import open_source
from mpo_jax.errors import UserError
from mpo_jax.models.hf.hub import local_model
from mpo_jax.pipeline import bucket
from mpo_jax.runtime import machine
from mpo_jax.runtime.stage_warnings import collect_warnings, warn
from mpo_jax.tools import doctor
from mpo_jax.tools.judge.endpoint import Endpoint
from mpo_jax.training import wandb_log
from tests.pipeline.test_pipeline import MICRO, mpo
from tests.tools.report import workdirs

MARK = "Pl4ntedPl4ntedPl4nted"
ENVIRONMENT = {
    "HF_TOKEN": f"hf_{MARK}Hub", "WANDB_API_KEY": f"{MARK}0123456789abcdef012", "OPENAI_API_KEY": f"sk-judge-{MARK}",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/aws+secret", "HTTPS_PROXY": f"http://user:{MARK}proxy@127.0.0.1:9",
    "HF_ENDPOINT": f"http://user:{MARK}hub@127.0.0.1:9",
}  # fmt: skip
PLANTED = {
    "userinfo": f"https://user:{MARK}@host/a", "query": f"gs://bucket/a?token={MARK}", "fragment": f"s3://b/a#{MARK}",
    "hub token": f"org/name@hf_{MARK}", "key": f"sk-{MARK}", "in a text": f"see https://{MARK}@host: {{prompt}}",
    "environment": ENVIRONMENT["WANDB_API_KEY"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back after --debug


def clean(text: str) -> bool:
    return MARK.lower() not in text.lower()


def check_files(folder: Path) -> list[str]:
    """Looks for the secrets in every file's bytes and name; the files' names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert MARK.encode() not in path.read_bytes() and clean(str(path.relative_to(folder))), path
    return [path.relative_to(folder).as_posix() for path in files]


# every key of the configuration


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def planted_at(key: Key, text: str) -> Iterator[Any]:
    """The text as this key's value, in every place that the value has."""
    yield text
    if key.type.startswith("list"):
        yield ["a", text]
    elif key.type.endswith("by name"):
        yield from ({"a": text}, {text: 1}, {"a": 1, text: "b"})


PARTS = [part for part in parts() if part.keys]
KEYS = [(part, key) for part in PARTS for key in part.keys]


def takes_text(key: Key) -> bool:
    return any(kind in key.type for kind in ("str", "by name"))


def ways(part: Part, key: Key, value: Any, yaml: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every way to set a key, and how its name is given back where all of it is known."""
    yaml.write_text(json.dumps(nested(key.name, value)), encoding="utf-8")
    short = key.name.removeprefix(part.name).removeprefix(".")
    yield f"{yaml}: ", lambda: load_config(yaml)
    yield f"{yaml}: ", lambda: load_config(None, (str(yaml),))
    yield f"{yaml}: ", lambda: read_record(yaml)
    yield f"{COMMAND_LINE}: ", lambda: load_config(None, (f"{key.name}={json.dumps(value)}",))
    yield "", lambda: Config(**nested(key.name, value))
    yield f"{part.kind.__name__}: ", lambda: part.kind(**{short: value})
    yield f"{part.kind.__name__}: ", lambda: part.kind.model_construct().model_copy(update={short: value})


@pytest.mark.parametrize(("part", "key"), KEYS, ids=[key.name for _, key in KEYS])
def test_every_key_refuses_secrets_wherever_it_is_set(part: Part, key: Key, tmp_path):
    kinds = PLANTED if takes_text(key) else ("userinfo",)
    for kind, value in [(name, value) for name in kinds for value in planted_at(key, PLANTED[name])]:
        every = list(ways(part, key, value, tmp_path / "run.yaml"))
        # the ways differ in where the values come from, and not in what counts as a secret
        for where, makes in every if kind == "userinfo" else every[4:5]:
            with pytest.raises(UserError) as caught:
                makes()
            said = str(caught.value)
            short = key.name.rpartition(".")[2]
            assert said.startswith("" if "Config" in where and not part.name else where)
            assert (short if "Config" in where else key.name) in said and "environment variables of the service" in said
            assert clean("".join(traceback.format_exception(caught.value)))


def test_the_walk_over_the_keys_is_whole():
    names = {key.name for _, key in KEYS if takes_text(key)}
    assert {"workdir", "text.template_options", "data.columns", "runtime.bucket", "runtime.wandb.entity"} < names
    assert {part.kind for part in PARTS} >= {
        kind for kind in vars(schema).values()
        if isinstance(kind, type) and issubclass(kind, schema.Section) and kind is not schema.Section
    }  # fmt: skip


def test_sections_in_a_configuration_and_keys_that_there_are_not():
    unchecked = ModelConfig.model_construct(path=PLANTED["userinfo"])
    for makes in (
        lambda: Config(model=unchecked),
        lambda: Config().model_copy(update={"model": unchecked}),
        lambda: Config(**{PLANTED["userinfo"]: 1}),
        lambda: Config(wörkdir=PLANTED["key"]),  # type: ignore[call-arg]
        lambda: DataConfig(kind="pairs", path=("a", PLANTED["query"])),
        lambda: load_config(None, (f"{PLANTED['userinfo']}.b=1",)),
        lambda: load_config(None, (f"https://user:{MARK}.q@host/c.yaml?a=1",)),
        lambda: load_config(None, (PLANTED["userinfo"],)),
        lambda: load_config(None, (f"workdir=[{PLANTED['userinfo']}",)),
        lambda: load_config(PLANTED["query"]),
    ):
        with pytest.raises(UserError) as caught:
            makes()
        assert clean(str(caught.value))


def test_an_address_that_interpolations_put_together(tmp_path):
    (tmp_path / "run.yaml").write_text(f"text: {{prompt_template: 'u:{MARK}'}}\nmodel: {{path: 'https:'}}")
    with pytest.raises(UserError, match=r"run\.yaml: workdir holds an address") as caught:
        load_config(tmp_path / "run.yaml", ("workdir=${model.path}//${text.prompt_template}@host",))
    assert clean(str(caught.value))


# commands


@pytest.mark.parametrize("flags", [(), ("--debug",)])
@pytest.mark.parametrize("command", ["run", "sft", "table", "config", "data", "doctor", "plan --on cpu"])
def test_a_command_refuses_before_it_writes(command, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for key in ("model.path", "workdir", "runtime.bucket", "seed"):
        arguments = (*command.split(), MICRO, f"workdir={tmp_path}/work", f"{key}={PLANTED['userinfo']}", *flags)
        if flags:
            with pytest.raises(UserError) as caught:
                mpo(*arguments)
            sys.excepthook(type(caught.value), caught.value, caught.tb)
        else:
            assert mpo(*arguments) == 2
        out, err = capsys.readouterr()
        assert f"{key} holds an address" in err and clean(out + err) and ("Traceback" in err) == bool(flags)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_and_a_report_hold_no_secret(tmp_path, monkeypatch, capfd):
    """Every place that a run writes to: workdir, TensorBoard, bucket, W&B, terminal."""
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    from tests.wandb_records import written

    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home" / name))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://user:{MARK}wandb@127.0.0.1:9/a?{MARK}#{MARK}")
    work, store = tmp_path / "work", tmp_path / "bucket"
    given = ("runtime.wandb.mode=offline", f"runtime.bucket=file://{store}", "sft.train.steps=2")
    try:
        assert mpo("sft", MICRO, f"workdir={work}", *given) == 0
        (logged,) = written(work)
        config = load_config(MICRO, (f"workdir={work}", *given))
        assert {k: v for k, v in logged.config.items() if k != "_wandb"} == config.model_dump(mode="json")
        reported = workdirs.make(tmp_path / "reported", ("sft",), configs={"sft": config})
        monkeypatch.setattr(sys, "argv", ["train.py", f"--hub=https://user:{MARK}@host/a", f"hf_{MARK}"])
        (reported / "runs" / "sft" / "env.json").write_text(json.dumps(machine.environment()))
        assert mpo("report", str(reported)) == 0
    finally:
        wandb.teardown()
    names = check_files(tmp_path)
    for wanted in (
        "manifest.json", "config.yaml", "metrics.jsonl", "events.out.tfevents", ".wandb", "env.json", "index.html",
        ".csv",
    ):  # fmt: skip
        assert any(wanted in name for name in names), wanted
    assert any(name.startswith("bucket/stages/sft-") for name in names)
    assert "--hub=https://***@host/a" in (reported / "report" / "index.html").read_text(encoding="utf-8")
    out, err = capfd.readouterr()
    assert "W&B" in out and clean(out + err)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, OSError, UserError])
def test_an_error_s_text_is_shown_without_secrets(kind, debug, capsys):
    """As of a library that quotes a request, with a cause that quotes more."""
    with pytest.raises((SystemExit, kind)) as caught, exits.reported(debug=debug):
        try:
            raise ValueError(f"sent {ENVIRONMENT['OPENAI_API_KEY']} by {ENVIRONMENT['HTTPS_PROXY']}")
        except ValueError as error:
            raise kind(f"403 for {PLANTED['query']} with hf_{MARK} and port '{MARK}proxy@host'") from error
    if debug:
        sys.excepthook(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert "403 for gs://bucket/a?***" in said and clean(said) and ("sent ***" in said) == debug


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_arguments_in_a_wrong_place(planted, capsys):
    for command in (
        (planted,),
        (f"--{planted}",),
        ("run", f"--{planted}"),
        ("human", planted),
        ("judge", "a", "b", "--tries", planted),
        ("config", "--keys", planted),
        ("config", "--keys", "seed", planted),
    ):
        assert mpo(*command) == 2
        said = "".join(capsys.readouterr().err.split()).replace("│", "")  # out of its box
        assert clean(said) and ("***" in said or command[0] == "judge"), command


def test_what_libraries_log(capsys, monkeypatch):
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger("some.library"), "handlers", [handler])
    previous = logging.getLogRecordFactory()
    try:
        mpo("version")
        logging.getLogger("some.library").warning("HTTP 500 while requesting GET %s", PLANTED["query"])
    finally:
        logging.setLogRecordFactory(previous)
    assert capsys.readouterr().err == "HTTP 500 while requesting GET gs://bucket/a?***\n"


# errors of the parts that know addresses


def test_models_and_rows_that_are_addresses():
    for opens, texts in (
        (local_model, PLANTED.values()),
        (open_source, PLANTED.values()),
        (lambda text: open_source(f"hub:{text}"), [PLANTED["userinfo"], PLANTED["query"]]),
    ):
        for text in texts:
            with pytest.raises(UserError) as caught:
                opens(text)
            assert clean(str(caught.value))


def test_a_bucket_s_error_quotes_a_signed_address(tmp_path, monkeypatch):
    store = bucket.Bucket(f"file://{tmp_path}")

    def refuses(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(
            f"403: https://store/x?X-Amz-Signature={MARK}, secret {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}"
        )

    monkeypatch.setattr(store._fs, "isfile", refuses)
    with pytest.raises(UserError, match=r"RuntimeError: 403: https://store/x\?\*\*\*") as caught:
        store.has("manifest.json")
    assert clean(str(caught.value))
    found = doctor.Check("bucket", "fail", "x", str(caught.value))
    assert clean(found.advice)


def test_the_server_of_wandb_and_the_doctor(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", exc_type=ImportError)
    address = f"http://user:{MARK}@127.0.0.1:9/a?{MARK}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setattr(wandb_log, "_session", wandb_log._Session())
    wandb_log._session.warn(f"W&B: {wandb_log.server()} cannot be used")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # the checks, by the command that prints them
    settings = WandbConfig(mode="online")
    checks = [
        doctor.wandb(settings),
        doctor.hub(dict(ENVIRONMENT)),
        doctor.hub({"HF_ENDPOINT": f"ftp://u:{MARK}@host"}),
    ]
    checks.append(doctor.hub({"HF_ENDPOINT": f"http://host:{MARK}"}))
    monkeypatch.setattr(doctor, "examine", lambda config: iter(checks))
    mpo("doctor", MICRO, "runtime.wandb.mode=online")
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="no credentials for") as caught:
        wandb_log.check(RuntimeConfig(wandb=settings).wandb)
    out, err = capsys.readouterr()
    assert clean(out + err + str(caught.value)) and out.count("not reached") == 3


def test_a_warning_in_a_manifest(capsys):
    with collect_warnings() as kept:
        warn(f"rows of {PLANTED['userinfo']} are cut")
    assert kept == ["rows of https://***@host/a are cut"] and clean(capsys.readouterr().out)


JUDGES = [
    (PLANTED["userinfo"], "m"), (f"https://host/v1?a={MARK}", "m"), (f"https://host/v1#{MARK}", "m"),
    (f"https://host/v1/sk-{MARK}", "m"), (f"https://host/{ENVIRONMENT['OPENAI_API_KEY']}/v1", "m"),
    *(("https://host/v1", PLANTED[kind]) for kind in PLANTED),
]  # fmt: skip


@pytest.mark.parametrize(("url", "model"), JUDGES)
def test_a_judge_s_address_and_name(url, model, tmp_path, capsys):
    with pytest.raises(UserError, match="put the key into the environment variable OPENAI_API_KEY") as caught:
        Endpoint.of(url, model, {}, concurrency=1, tries=1, timeout_s=1.0)
    assert clean(str(caught.value))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    assert mpo("judge", str(rows), str(rows), "--endpoint", url, "--model", model, "--out", str(tmp_path / "out")) == 2
    assert clean("".join(capsys.readouterr())) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_sides_of_a_comparison(planted, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    at, out = ("--endpoint", "http://127.0.0.1:9/v1", "--model", "m"), ("--out", str(tmp_path / "out"))
    for command in (
        ("judge", planted, str(rows), *at, *out),
        ("judge", str(rows), str(rows), "--model", planted, *out),
        ("human", "export", planted, str(rows), *out),
        ("human", "export", str(rows), str(rows), "--data", planted, *out),
        ("generate", planted, "--prompt", "a"),
        ("export", planted, "--to", str(tmp_path / "to")),
    ):
        assert mpo(*command) == 2
    assert clean("".join(capsys.readouterr())) and sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
