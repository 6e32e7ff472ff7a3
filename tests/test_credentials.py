"""What counts as credentials in a text, and what is left of it once they are hidden."""

import time

import pytest

from mpo_jax import credentials
from mpo_jax.credentials import find, hide
from mpo_jax.errors import UserError

S = "S3cr3tS3cr3tS3cr3tS3cr3tS3cr3tS3cr3t"

HOLD = [
    (f"https://user:{S}@host/a", "https://***@host/a"),
    (f"https://{S}@host", "https://***@host"),
    (f"https://user:{S}/with/slashes@host/a", "https://***@host/a"),
    (f"gs://bucket/a?token={S}", "gs://bucket/a?***"),
    (f"gs://bucket/a#{S}", "gs://bucket/a#***"),
    (f" https://host/a b?token={S}", " https://host/a b?token=***"),
    (f"hub:https://host/a?x={S}", "hub:https://host/a?***"),
    (f"s3:/{S}@bucket", "s3:/***@bucket"),
    (f"Read https://user:{S}@host: {{prompt}}", "Read https://***@host: {prompt}"),
    (f"models/hf_{S}/x", "models/***/x"),
    (f"org/name@hf_{S}", "org/name@***"),
    (f"https://host/a;token={S}", "https://host/a;token=***"),
    (f"/a?api_key={S}&x=1", "/a?api_key=***&x=1"),
    (f"key is sk-{S}.", "key is ***."),
    (f"sk-proj-{S}", "***"),
    (f"ghp_{S}", "***"),
    (f"wandb_v1_{S}", "***"),
    ("AKIA" + "S3CR3T7Q" * 2, "***"),
    (f"eyJ{S}.eyJ{S}.{S}", "***"),
]


@pytest.mark.parametrize(("text", "hidden"), HOLD)
def test_texts_with_credentials(text, hidden):
    assert find(text) is not None and S not in str(find(text))
    for quoted, expected in ((text, hidden), (f"see {text!r}: gone", f"see {hidden!r}: gone")):
        assert hide(quoted) == expected
        assert str(UserError(quoted)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "runs/default", "~/.cache/mpo_jax/xla", "gs://bucket/folder/a@b", "http://localhost:8000/v1", "host:8476",
        "https://host:8000/a@b", "hub:org/name@main:train", "org/name@v1.0", "runs/a#1", "is it? {prompt}", "a@b.c",
        "models/hf_transformers_of_mine", "runs/sk-learn-experiments-of-2024", "runs/AKIAN", "Q: {prompt}\n#A:", "",
    ],
)  # fmt: skip
def test_texts_without_credentials(text):
    assert find(text) is None and hide(text) == text


def test_a_link_in_a_prompt_is_no_credential_but_a_message_cuts_it():
    text = "Read https://host/a?page=3 and answer: {prompt}"
    assert find(text) is None and hide(text) == "Read https://host/a?*** and answer: {prompt}"


@pytest.mark.parametrize("name", credentials.VARIABLES)
def test_credentials_of_the_environment(name, monkeypatch):
    monkeypatch.setenv(name, "0123456789abcdef")
    assert find("a/0123456789abcdef/b") == f"the value of the environment variable {name}"
    assert hide("a/0123456789abcdef/b") == "a/***/b"
    monkeypatch.setenv(name, "EMPTY")
    assert find("EMPTY") is None and hide("EMPTY") == "EMPTY"


@pytest.mark.parametrize("name", [*credentials.ADDRESSES, "https_proxy"])
def test_passwords_in_addresses_of_the_environment(name, monkeypatch):
    """Libraries quote a part of the address, such as what they take for a port, or decode it."""
    monkeypatch.setenv(name, "https://user:pass%21word9@host:80/a@b")
    assert hide("port 'pass%21word9@host'; pass!word9") == "port '***@host'; ***"
    monkeypatch.setenv(name, "https://host:80/user:password@x")
    assert hide("password user:password host") == "password user:password host"


LONG = ("://a:b" * 8_000 + " @?", "b:/" * 8_000 + "@?", "a" * 100_000 + "@?", "?key" * 25_000)


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:6])
def test_long_texts_take_no_minutes(text):
    begin = time.process_time()
    find(text)
    hide(text)
    assert time.process_time() - begin < 10
