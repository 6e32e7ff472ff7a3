"""mpo_jax.models.hf.hub: what a model's path may name, and what is said where the hub does not give it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from mpo_jax.errors import UserError
from mpo_jax.models.hf.hub import UNWANTED, WANTED, is_wanted, local_model

TOKEN = "hf_AbCdEfGhIjKlMnOp"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing remembered, and a token about that no message may repeat."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local_model.cache_clear()
    yield
    local_model.cache_clear()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the download: records its calls, and raises `hub.error` while there is one."""
    state = SimpleNamespace(calls=[], error=None, folder=tmp_path / "cache" / "snapshot")

    def download(*args, **options):
        state.calls.append((args, options))
        if state.error is not None:
            raise state.error
        return str(state.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return state


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind(f"401 Client Error. Authorization: Bearer {TOKEN}", response=response)


def test_local_folder_and_file(tmp_path, hub):
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").touch()
    assert local_model(str(tmp_path / "folder")) == tmp_path / "folder"
    assert local_model(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    assert not hub.calls


def test_home_folder(tmp_path, monkeypatch, hub):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    assert local_model("~/folder") == tmp_path / "folder"


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch, hub):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_model("org/name").resolve() == tmp_path / "org" / "name"
    assert not hub.calls


def test_other_file(tmp_path, hub):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.safetensors is a file: name the model's folder, or a \.gguf file"):
        local_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "path", ["gpt2", "a/b/c", "/nowhere/model", "./org/name", "../name", "~/name", "org/model.gguf", "/x", "nowhere/"]
)
def test_neither_path_nor_hub_id(path, hub):
    hub.error = HFValidationError("not asked for any of these but 'nowhere/'")
    with pytest.raises(UserError) as error:
        local_model(path)
    assert str(error.value).startswith(f"no model at {path}: no such folder") and "hub id (org/name)" in str(
        error.value
    )
    assert not hub.calls or path == "nowhere/"


@pytest.mark.parametrize(("path", "revision"), [("org/name", None), ("org/name@v1.0", "v1.0"), ("org/name@", None)])
def test_download(path, revision, hub):
    assert local_model(path) == hub.folder
    ((args, options),) = hub.calls
    assert args == ("org/name",)
    assert options == {
        "revision": revision, "allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)
    }  # fmt: skip


def test_pickled_weights_are_not_fetched():
    names = [
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "model.ckpt",
        "tf_model.h5",
        "modeling_custom.py",
        "model.pkl",
    ]
    assert not [name for name in names if is_wanted(Path(name))]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "a.jinja"]
    assert all(is_wanted(Path(name)) for name in wanted)


def test_what_is_fetched_of_a_repository():
    """Weights that lie there a second time are not: a folder of their author's layout, or a file of it."""
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/params.json",
              "original/model.safetensors", "original/tokenizer.model", "onnx/config.json", "README.md"]  # fmt: skip
    patterns = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("cannot find it on disk"), r"org/name could not be fetched.*\(LocalEntryNotFoundErr"),
        (http_error(RepositoryNotFoundError), r"the hub has no such repository \(or it is private: `hf auth login`"),
        (http_error(GatedRepoError), r"org/name is gated: accept its terms at https://huggingface\.co/org/name, then"),
        (http_error(RevisionNotFoundError), r"org/name has no revision 'v9' on the hub"),
        (http_error(HfHubHTTPError), r"could not be fetched from the hub \(HfHubHTTPError\)"),
        (HFValidationError("Repo id must use alphanumeric chars"), r"no such folder, and no valid hub id \(org/name\)"),
        (OSError(28, "No space left on device"), r"could not be fetched from the hub \(No space left on device\)"),
        (ConnectionError(f"lost while sending {TOKEN}"), r"could not be fetched from the hub \(ConnectionError\)"),
        (RuntimeError(f"from below: {TOKEN}"), r"could not be fetched from the hub \(RuntimeError\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses(error, message, hub):
    hub.error = error
    with pytest.raises(UserError, match=message) as raised:
        local_model("org/name@v9")
    assert TOKEN not in str(raised.value) and raised.value.__cause__ is error


def test_failures_are_not_remembered_and_successes_are(hub):
    hub.error = LocalEntryNotFoundError("offline")
    for _ in range(2):
        with pytest.raises(UserError):
            local_model("org/name")
    hub.error = None
    assert local_model("org/name") == local_model("org/name") == hub.folder
    assert len(hub.calls) == 3
