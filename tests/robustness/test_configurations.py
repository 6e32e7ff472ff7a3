"""Hostile and broken YAML, JSON and addresses in configurations: each ends in a message with its fault."""

import json
import os
from pathlib import Path

import pytest

from mpo_jax.config.load import load_config, read_record
from mpo_jax.data.chat import read_template
from mpo_jax.errors import UserError
from mpo_jax.untrusted import MAX_DEPTH, open_file, parse_json, read_json

DEEP = "[" * 50_000 + "]" * 50_000
LONG = "9" * 5_000

# YAML

YAML = {
    "deep lists": ("a: " + DEEP, "run.yaml:1: broken YAML: nested more than 100 deep"),
    "octal number": ("seed: 010", "run.yaml:1: YAML reads 010 as a number of base 8: write it as a decimal"),
    "tagged octal number": ('seed: !!int "010"', "run.yaml:1: YAML reads 010 as a number of base 8"),
    "number of base 60": ("seed: 1:30", "run.yaml:1: YAML reads 1:30 as a number of base 60"),
    "fraction of base 60": ("seed: 1:30.5", "run.yaml:1: YAML reads 1:30.5 as a number of base 60"),
    "open brackets": ("a: " + "[" * 50_000, "nested more than 100 deep"),
    "deep mappings": ("a: " + "{a: " * 5000 + "}" * 5000, "nested more than 100 deep"),
    "deep dashes": ("- " * 5000 + "a", "nested more than 100 deep"),
    "digits": (f"seed: {LONG}", "cannot read"),
    "no number": ("seed: !!int x", "cannot read"),
    "no time": ("seed: !!timestamp x", "cannot read"),
    "no float": ("seed: !!float x", "cannot read"),
    "Python": ("seed: !!python/object/apply:os.system [echo]", "broken YAML: could not determine a constructor"),
    "bomb": ("a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n"
                                       for i in range(20)), "run.yaml"),
    "merge of itself": ("a: &a {<<: *a}", "run.yaml"),
    "interpolations": ("workdir: '" + "${seed}" * 50 + "'", "more than 20 interpolations"),
    "nested interpolations": ("workdir: '" + "${" * 5000 + "'", "more than 20 interpolations"),
    "environment": ("workdir: ${oc.env:HOME}", "calls a resolver"),
    "no UTF-8": ("workdir: \udcff", "not UTF-8 text"),
    "list": ("- a", "a mapping of keys to values, not a list"),
    "cut off": ("a: {b: 1", "broken YAML"),
    "tab": ("a:\n\t- b", "broken YAML"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("content", "says"), YAML.values(), ids=YAML)
def test_yaml_that_is_no_configuration(content, says, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert says in str(caught.value) and "run.yaml" in str(caught.value)
    if "interpolation" in says or "resolver" in says:  # a record has them as text
        return
    with pytest.raises(UserError):
        read_record(path)


@pytest.mark.parametrize("value", [DEEP, "[" * 50_000, "!!int x", "!!timestamp x", LONG, "${" * 5000])
def test_an_override_that_is_no_value(value):
    with pytest.raises(UserError) as caught:
        load_config(None, (f"data.path={value}" if value == LONG else f"workdir={value}", "seed=[1"))
    assert "Traceback" not in str(caught.value)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("reads", [open_file, read_json, load_config, read_record, read_template])
def test_pipes_folders_and_devices_are_no_files(reads, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(UserError, match=f"it is {what}, not a file"):
            reads(str(path) if reads is read_template else path)


def test_a_shell_s_own_pipe_is_read():
    reading, writing = os.pipe()
    os.write(writing, b'{"a": 1}')
    os.close(writing)
    assert read_json(f"/dev/fd/{reading}") == {"a": 1}
    os.close(reading)


def test_the_limits_of_json():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "here", list)
    with pytest.raises(UserError, match="here: broken JSON: nested more than 100 deep"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "here", list)
    # digits and brackets in a text are text
    assert parse_json(json.dumps({"a": LONG + "[" * 500}), "here") == {"a": LONG + "[" * 500}
    assert parse_json(b'{"model_max_length": 1000000000000000019884624838656}', "here")


# addresses

SECRET = "S3CRET"
ADDRESSES = [f"gs://user:{SECRET}@bucket/a", f"gs://{SECRET}@bucket", f"gs://b/a?token={SECRET}", f"gs://b/a#{SECRET}"]
KEYS = ["model.path", "reward.path", "data.path", "data.test_path", "runtime.bucket", "workdir", "text.chat_template"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_secret_is_refused_and_not_repeated(key, address, tmp_path):
    section, _, name = key.rpartition(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: '{address}'}}" if section else f"{name}: '{address}'")
    for path, overrides in ((None, (f"{key}={address}",)), (tmp_path / "run.yaml", ())):
        with pytest.raises(UserError) as caught:
            load_config(path, overrides)
        assert SECRET not in str(caught.value) and key in str(caught.value)


# interpolations from key to key


def doubling(count: int, form: str = "'${{{0}}}${{{0}}}'") -> str:
    lines = [f"  k{n}: {form.format(f'dpo.loss_options.k{n + 1}')}" for n in range(count)]
    return "dpo:\n loss_options:\n" + "\n".join([*lines, f"  k{count}: aaaaaaaa"])


GROWING = {
    "texts": doubling(60),
    "mappings": doubling(40, "{{x: '${{{0}}}', y: '${{{0}}}'}}"),
    "names in names": "workdir: dpo\n" + doubling(60).replace("${dpo.", "${${workdir}."),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", GROWING.values(), ids=GROWING)
def test_interpolations_that_double_are_refused(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match=r"run\.yaml: dpo\.loss_options\.\S+ gets longer than 100000 characters by its"):
        load_config(tmp_path / "run.yaml")


def test_a_chain_of_keys_has_an_end(tmp_path):
    (tmp_path / "run.yaml").write_text(doubling(150, "'${{{0}}}'"))
    with pytest.raises(UserError, match="leads over more than 100 keys"):
        load_config(tmp_path / "run.yaml")


def test_references_of_every_form_are_followed(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "workdir: ${data.path}/${data.kind}\ndata: {path: a, kind: pairs, test_path: '${.path}-${..data.path}'}"
    )
    loaded = load_config(tmp_path / "run.yaml")
    assert loaded.workdir == "a/pairs" and "a-a" in str(loaded.data.test_path)
