"""Hostile, damaged and odd model folders, configurations and templates: each ends in a message with its fault.

No case may raise anything but UserError, and none may hang. Nothing is compiled.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.data import toy
from mpo_jax.data.chat import Chat
from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.hf import families, weights
from mpo_jax.models.hf.tokenizer import load_tokenizer, repeats_repeated
from tests.models.tiny import RECORDED

DEEP = "[" * 50_000 + "]" * 50_000
LONG = "9" * 5_000
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"

Change = Callable[[Path], None]


def config(**keys: Any) -> Change:
    """Other keys in config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def text(name: str, content: str | bytes) -> Change:
    """A file of other content."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def directory(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def tensor(make: Callable[[np.ndarray], np.ndarray | None], name: str = NORM) -> Change:
    """One tensor made of the old one; None: without it."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = load_file(path)
        held[name] = make(held[name])
        save_file({key: value for key, value in held.items() if value is not None}, path)

    return change


def filled(value: float, kind: Any = np.float32) -> Change:
    return tensor(lambda old: np.where(np.arange(old.size) == 1, value, 0.5).astype(kind).reshape(old.shape))


def index(file: str, *, link: str | None = None) -> Change:
    """A weight index in which all tensors are in one file."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        names = load_file(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
        if link is not None:
            (folder / file).symlink_to(link)

    return change


def rope(**keys: Any) -> Change:
    return config(rope_parameters={"rope_theta": 10000.0, **keys})


def two_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch.safetensors")


def key_missing(key: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps({**values, "model_type": "llama"}))

    return change


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
FOLDERS: dict[str, tuple[Change, str]] = {
    # config.json
    "config: pipe": (fifo("config.json"), "config.json: it is a named pipe, not a file"),
    "config: folder": (directory("config.json"), "config.json: it is a folder, not a file"),
    "config: missing": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config: empty": (text("config.json", ""), "config.json: broken JSON"),
    "config: cut off": (text("config.json", '{"model_type": "lla'), "config.json: broken JSON"),
    "config: list": (text("config.json", "[1]"), "broken JSON: expected an object, found list"),
    "config: number": (text("config.json", "1"), "broken JSON: expected an object, found int"),
    "config: no UTF-8": (text("config.json", b"\xff\xfe{}"), "config.json: not UTF-8 text"),
    "config: deep": (text("config.json", f'{{"a": {DEEP}}}'), "config.json: broken JSON: nested more than 100"),
    "config: rather deep": (text("config.json", "[" * 90 + "]" * 90), "broken JSON: expected an object, found list"),
    "config: deep within": (text("config.json", '{"a": ' + "[" * 300 + "]" * 300 + "}"), "nested more than 100 deep"),
    "config: a key twice": (text("config.json", '{"model_type": "llama", "model_type": "qwen2"}'), "stands twice"),
    "config: digits": (text("config.json", f'{{"vocab_size": {LONG}}}'), "integer of 5000 digits"),
    "config: 200 digits": (text("config.json", f'{{"vocab_size": {LONG[:200]}}}'), "integer of 200 digits"),
    "config: dangling link": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("nowhere"), None)[-1],
        "config.json is missing",
    ),
    "type: none": (config(model_type=None), "model_type None is not supported"),
    "type: list": (config(model_type=["llama"]), "model_type ['llama'] is not supported"),
    "type: other": (config(model_type="bert"), "model_type 'bert' is not supported; supported: llama"),
    "dtype: list": (config(dtype=["x"]), "dtype=['x'] is no name of a type"),
    "dtype: no element": (config(dtype=[]), "dtype=[] is no name of a type"),
    "dtype: number": (config(torch_dtype=1e308), "torch_dtype=1e+308 is no name of a type"),
    "layers: ten million": (config(num_hidden_layers=10**7), "num_hidden_layers=10000000 is more than any model has"),
    "layers: 90 digits": (config(num_hidden_layers=10**90), "is more than any model has"),
    "layers: none": (config(num_hidden_layers=0), "num_layers=0 must be positive"),
    "layers: negative": (config(num_hidden_layers=-1), "num_layers=-1 must be positive"),
    "layers: text": (config(num_hidden_layers="two"), "num_hidden_layers"),
    "layers: more than there are": (config(num_hidden_layers=5000), "more are missing"),
    "head_dim: huge": (config(head_dim=10**9), "head_dim=1000000000 is more than any model has"),
    "head_dim: odd": (config(head_dim=3), "head_dim=3 is odd"),
    "labels: a billion": (config(num_labels=10**9), "num_labels=1000000000 is more than any model has"),
    "vocabulary: huge": (config(vocab_size=10**12), "vocab_size=1000000000000 is more than any model has"),
    "vocabulary: large": (config(vocab_size=2**30), "has shape (40, 32), but config.json asks for 34359738368 numbers"),
    "hidden: other": (config(hidden_size=64), "belong together"),
    "hidden: negative": (config(hidden_size=-4), "hidden_size=-4 must be positive"),
    "MLP: other": (config(intermediate_size=10**9), "config.json asks for 32000000000 numbers"),
    "heads: none": (config(num_attention_heads=0), "num_attention_heads=0 must be positive"),
    "heads: uneven": (config(num_attention_heads=4, num_key_value_heads=3), "no multiple of num_kv_heads"),
    "positions: none": (config(max_position_embeddings=0), "max_positions=0 must be positive"),
    "eps: negative": (config(rms_norm_eps=-1.0), "norm_eps (rms_norm_eps or layer_norm_eps)=-1.0 must be positive"),
    "eps: NaN": (config(rms_norm_eps=float("nan")), "=nan must be positive"),
    "eps: infinite": (config(rms_norm_eps=float("inf")), "=inf must be positive"),
    "eps: large": (config(rms_norm_eps=5.0), "norm_eps=5.0 must be below 1"),
    "activation": (config(hidden_act="relu"), "hidden_act='relu' is not supported"),
    "activation: list": (config(hidden_act=["silu"]), "hidden_act"),
    "bias": (config(attention_bias=True), "attention_bias=True is not supported"),
    "quantised": (config(quantization_config={"bits": 4}), "quantization_config is not supported"),
    "labels: number": (config(id2label=5), "config.json: "),
    "rope: zero factor": (rope(rope_type="linear", factor=0), "rope factor=0.0 must be positive"),
    "rope: negative factor": (rope(rope_type="linear", factor=-2.0), "rope factor=-2.0 must be positive"),
    "rope: NaN factor": (rope(rope_type="linear", factor=float("nan")), "rope factor=nan must be positive"),
    "rope: text factor": (rope(rope_type="linear", factor="two"), "factor='two' in the rope parameters is no"),
    "rope: no factor": (rope(rope_type="linear"), "factor"),
    "rope: longrope": (rope(rope_type="longrope", factor=2.0, short_factor=[1.0], long_factor=[1.0]), "longrope"),
    "rope: zero theta": (config(rope_parameters={"rope_theta": 0.0}), "rope_theta=0.0 must be positive"),
    "rope: text theta": (config(rope_parameters={"rope_theta": "a"}), "rope_theta='a' is not a number"),
    "rope: list": (config(rope_parameters=[1]), "rope_parameters"),
    "rope: equal bands": (rope(**LLAMA3, low_freq_factor=1.0, high_freq_factor=1.0), "high_freq_factor - low_freq_"),
    "rope: no length": (
        rope(**(LLAMA3 | {"original_max_position_embeddings": 0}), low_freq_factor=1.0, high_freq_factor=4.0),
        "original_max_position_embeddings=0",
    ),
    "rope: theta 1 of yarn": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0,
                                "original_max_position_embeddings": 32}),
        "rotary frequencies that are no positive numbers",
    ),
    "rope: two thetas": (
        config(rope_theta=500.0, rope_parameters={"rope_theta": 10000.0}),
        "rope_theta=500.0, but rope_parameters say 10000.0: remove the one that is wrong",
    ),
    "rope: two scalings": (
        config(rope_scaling={"type": "linear", "factor": 2.0},
               rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}),
        "remove the one that is wrong",
    ),
    # weights
    "weights: missing": (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
    "weights: pipe": (fifo("model.safetensors"), "no weights in"),
    "weights: folder": (directory("model.safetensors"), "no weights in"),
    "weights: empty": (text("model.safetensors", b""), "broken safetensors file"),
    "weights: garbage": (text("model.safetensors", b"\x00" * 100), "broken safetensors file"),
    "weights: huge header": (text("model.safetensors", b"\xff" * 16), "broken safetensors file"),
    "weights: deep header": (text("model.safetensors", len(DEEP).to_bytes(8, "little") + DEEP.encode()), "broken safe"),
    "weights: cut off": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000), "broken safetensors file"),
    "weights: another name": (two_files, "pytorch.safetensors may hold them"),
    "weights: pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        "pytorch_model.bin is pickled and is not read",
    ),
    "weights: their author's": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors") and None,
        "consolidated.safetensors is in its author's own layout",
    ),
    "tensor: NaN": (filled(np.nan), f"model.safetensors: tensor {NORM} holds NaN or infinity"),
    "tensor: infinite": (filled(np.inf), "holds NaN or infinity"),
    "tensor: NaN of float16": (filled(np.nan, np.float16), "holds NaN or infinity"),
    "tensor: NaN of bfloat16": (filled(np.nan, ml_dtypes.bfloat16), "holds NaN or infinity"),
    "tensor: infinite float64": (filled(-np.inf, np.float64), "holds NaN or infinity"),
    "tensor: integers": (filled(1, np.int8), f"tensor {NORM} has type I8, not floating-point numbers"),
    "tensor: booleans": (filled(1, np.bool_), "has type BOOL, not floating-point numbers"),
    "tensor: 8-bit floats": (filled(1, ml_dtypes.float8_e4m3fn), "has type F8_E4M3, not floating-point numbers"),
    "tensor: missing": (tensor(lambda old: None), f"tensor {NORM} is missing"),
    "tensor: longer": (tensor(lambda old: np.ones(33, np.float32)), "has shape (33,), but config.json asks for (32,)"),
    "tensor: of another rank": (tensor(lambda old: old[None]), "has shape (1, 32)"),
    "tensor: empty": (tensor(lambda old: old[:0]), "has shape (0,)"),
    # an index
    "index: above": (index("../outside.safetensors"), "which is outside the folder"),
    "index: absolute": (index("/etc/passwd"), "which is outside the folder"),
    "index: below": (index("a/b.safetensors"), "which is outside the folder"),
    "index: link": (index("a.safetensors", link="../outside.safetensors"), "a link that leads out of it"),
    "index: absolute link": (index("a.safetensors", link="/etc/passwd"), "a link that leads out of it"),
    "index: circle": (index("a.safetensors", link="a.safetensors"), "a.safetensors, which is not there"),
    "index: zero byte": (index("a\x00.safetensors"), "outside the folder"),
    "index: long name": (index("a" * 5000 + ".safetensors"), "not there"),
    "index: dots": (index(".."), "outside the folder"),
    "index: nothing": (index(""), "outside the folder"),
    "index: no such file": (index("a.safetensors"), "names a.safetensors, which is not there"),
    "index: of other files": (index("config.json"), "config.json, which is no safetensors file"),
    "index: pickle": (index("a.bin"), "a.bin, which is no safetensors file"),
    "index: list": (text(INDEX, "[]"), "expected an object, found list"),
    "index: empty": (text(INDEX, "{}"), "weight_map must give the file of every tensor"),
    "index: numbers": (text(INDEX, '{"weight_map": {"a": 1}}'), "weight_map must give the file of every tensor"),
    "index: of lists": (text(INDEX, '{"weight_map": []}'), "weight_map must give the file of every tensor"),
    "index: deep": (text(INDEX, f'{{"weight_map": {DEEP}}}'), "nested more than 100 deep"),
    "index: pipe": (fifo(INDEX), "it is a named pipe, not a file"),
    "index: two sets": (text(INDEX, '{"weight_map": {"a": "b.safetensors"}}'), "two sets of weights"),
    # beside them
    "readout: deep": (text("readout.json", DEEP), "nested more than 100 deep"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(RECORDED / "tied", folder)
    return folder


def opened(folder: Path) -> None:
    """All that is looked at of a model: its files, and each tensor."""
    source = loading.open_model(folder)
    weights.check_tensors(source.tensors, source.decoder, head="lm")
    for name in source.tensors.names():
        source.tensors.read(name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "says"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_no_model_is_named_with_its_fault(change, says, plain, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    change(folder)
    if says.startswith("nested") and (folder / "readout.json").exists():
        folder.rename(tmp_path / "score")
        shutil.copytree(RECORDED / "llama_score", folder)
        shutil.copy(tmp_path / "score" / "readout.json", folder)
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value)


def test_the_plain_folder_is_a_model(plain):
    opened(plain)


def test_links_of_the_hub_s_cache_are_followed(tmp_path):
    """snapshots/REVISION holds links to ../../blobs, also of a weight index's files."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((RECORDED / "untied").iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    opened(snapshot)
    (tmp_path / "linked").symlink_to(snapshot)
    opened(tmp_path / "linked")


def test_weights_beside_the_model_s_are_said(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "model")
    shutil.copy(plain / "model.safetensors", tmp_path / "model" / "other.safetensors")
    notes = loading.open_model(tmp_path / "model").tensors.notes  # type: ignore[attr-defined]
    assert "the weights are read from model.safetensors; other.safetensors beside it is left alone" in notes


def test_what_rope_s_keys_agree_on_is_read(plain, tmp_path):
    """Written folders have both: version 4's keys and version 5's."""
    shutil.copytree(plain, tmp_path / "model")
    config(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4},
           rope_parameters={"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0})(tmp_path / "model")  # fmt: skip
    assert families.read_config(tmp_path / "model").pattern[0].rope_theta == 500.0


# tokenizers

PATTERN = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
TOKENIZERS: dict[str, tuple[Change, str]] = {
    "tokenizer: none": (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "tokenizer: garbage": (text("tokenizer.json", "{"), "cannot read the tokenizer"),
    "tokenizer: deep": (text("tokenizer.json", DEEP), "cannot read the tokenizer"),
    "tokenizer: pipe": (fifo("tokenizer.json"), "it is a named pipe"),
    "tokenizer: pattern": (
        lambda folder: (
            (folder / "tokenizer.json").write_text(
                json.dumps(json.loads((folder / "tokenizer.json").read_text()) | {"pre_tokenizer": PATTERN})
            )
            and None
        ),
        "the pattern '(a+)+$' repeats what is repeated in it",
    ),
    "its configuration: pipe": (fifo("tokenizer_config.json"), "it is a named pipe"),
    "its configuration: deep": (text("tokenizer_config.json", f'{{"a": {DEEP}}}'), "nested more than 100 deep"),
    "its configuration: list": (text("tokenizer_config.json", "[]"), "expected an object"),
    "its special tokens: pipe": (fifo("special_tokens_map.json"), "it is a named pipe"),
    "its added tokens: deep": (text("added_tokens.json", f'{{"a": {DEEP}}}'), "nested more than 100 deep"),
    "its template: pipe": (fifo("chat_template.jinja"), "it is a named pipe"),
    "generation: deep": (text("generation_config.json", f'{{"a": {DEEP}}}'), "nested more than 100 deep"),
    "generation: list": (text("generation_config.json", "[]"), "expected an object, found list"),
    "generation: text": (text("generation_config.json", '{"eos_token_id": "x"}'), "must be a token's id"),
    "generation: unknown": (text("generation_config.json", '{"eos_token_id": 999999}'), "the tokenizer has no such id"),
}


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    toy.make_tokenizer().save_pretrained(folder)
    shutil.copy(RECORDED / "tied" / "config.json", folder)
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "says"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_is_none_is_named(change, says, with_tokenizer, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(with_tokenizer, folder)
    change(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a*)*", r"((a+)b?)*", r"(?:x|[a-z]+)*", r"(\w+\s*)+$", "(a{2,})+"])
def test_patterns_that_repeat_what_is_repeated(pattern):
    assert repeats_repeated(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r" ?[^(\s|[.,!?…])]+",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)",
        r"[^\r\n\p{L}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|(\r?\n)+",
    ],
)
def test_patterns_of_real_tokenizers_are_taken(pattern):
    assert not repeats_repeated(pattern)


# chat templates

LOOP = "{% for i in range(99999) %}"
TWINS = (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}"
)
TEMPLATES = {
    "loops in loops": (f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}", "too many steps"),
    "loops that filter": (LOOP + "{% for j in range(99999) if false %}{% endfor %}{% endfor %}", "too many steps"),
    "a loop that recurs": ("{% for x in range(9) recursive %}{{ loop(range(99)) }}{% endfor %}", "fails on turns"),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}", "too many"),
    "a macro for ever": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply"),
    "a long text": ("{{ 'a' * 10**9 }}", "a text of more than 10000000 characters"),
    "a list of it": ("{{ [1] * 10**9 }}", "a text of more than 10000000 characters"),
    "doubling": (
        "{% set n = namespace(x='aa') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "fails on turns",
    ),
    "adding": (
        "{% set n = namespace(x='aa') %}" + LOOP + "{% set n.x = n.x + n.x %}{% endfor %}",
        "more than 10000000",
    ),
    "nesting": ("{% set n = namespace(x=1) %}" + LOOP + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", "too many"),
    "nesting, formatted": (TWINS + "{{ '{}'.format(n.x) }}", "too many"),
    "nesting, as a percent sign does": (TWINS + "{{ '%s' % n.x }}", "too many"),
    "nesting, by the filter": (TWINS + "{{ '%s' | format(n.x) }}", "too many"),
    "nesting, compared": (TWINS + "{{ n.x == n.y }}", "too many"),
    "nesting, ordered": (TWINS + "{{ n.x < n.y }}", "too many"),
    "nesting, searched": (TWINS + "{{ n.x in [n.y] }}", "too many"),
    "nesting, tested": (TWINS + "{{ n.x is eq(n.y) }}", "too many"),
    "nesting, counted": (TWINS + "{{ [n.y].count(n.x) }}", "too many"),
    "squares": ("{% set n = namespace(x=9) %}" + LOOP + "{% set n.x = n.x * n.x %}{% endfor %}", "10000 bits"),
    "powers": ("{% set x = 9 ** 99999 %}", "10000 bits"),
    "tabs": ("{% set x = ('\\t'*1000).expandtabs(9999999) %}", "by expandtabs"),
    "indented JSON": ("{{ ([1]*600)|tojson(indent=9999999) }}", "tojson with an indent"),
    "JSON with long separators": ("{{ ([1]*600)|tojson(separators=('a'*1000000, ':')) }}", "or a separator of more"),
    "indented lines": ("{{ ('a\\n'*600)|indent(9999999) }}", "by indent"),
    "wrapped words": ("{{ ('a '*6000)|wordwrap(1, wrapstring='b'*1000000) }}", "by wordwrap"),
    "a name many times": ("{{ ('%(a)s'*6000) % {'a': 'b'*1000000} }}", "it formats a text"),
    "a filter's name many times": ("{{ ('%(a)s'*6000)|format(a='b'*1000000) }}", "it formats a text"),
    "a place many times": ("{{ ('{0}'*6000).format('b'*1000000) }}", "it formats a text"),
    "a key many times": ("{{ ('{a}'*6000).format_map({'a': 'b'*1000000}) }}", "it formats a text"),
    "a width from a value": ("{{ ('{0:{1}}'*600).format(5, 9999999) }}", "it formats a text"),
    "a width from a tuple": ("{{ ('%*d'*600) % ((9999999, 5)*600) }}", "it formats a text"),
    "one wide width": ("{{ '%*d' % (999999999, 5) }}", "it formats a text"),
    "a width from a text": ("{{ ('{0:{1}}'*600).format(5, '9999999') }}", "it formats a text with a width"),
    "a width from an attribute": (
        "{{ '{0:{1.stop}}'.format(5, range(9999990, 9999999)) }}",
        "with a width that a value",
    ),
    "a table of letters": ("{{ ('a'*6000).translate({97: 'b'*1000000}) }}", "it calls translate"),
    "joined as they come": ("{{ (['a']*6000)|map('string')|join('b'*1000000) }}", "by join"),
    "joined as they come by a text": ("{{ ('b'*1000000).join((['a']*6000)|map('string')) }}", "by join"),
    "ends of a text": (
        "{% set t = 'a'*9999999 %}{% set n = namespace(x=[]) %}"
        "{% for i in range(900) %}{% set n.x = n.x + [t[i:]] %}{% endfor %}",
        "too many steps",
    ),
    "widths together": ("{{ ('%99999d'*600) % ((5,)*600) }}", "it formats a text"),
    "bytes": ("{{ 'a'.encode() * 99999999999 }}", "it makes bytes"),
    "a number's bytes": ("{{ (1).to_bytes(9999999) * 9999 }}", "it makes bytes"),
    "parts of a text": ("{{ ('a '*4000000).split() }}", "by split"),
    "a long batch": ("{{ [1]|batch(9999999, 0)|list }}", "by batch"),
    "many slices": ("{{ [1]|slice(9999999)|list }}", "by slice"),
    "a wide format": ("{{ '%999999999d' % 5 }}", "it formats a text of more than"),
    "another": ("{{ '{:999999999}'.format(5) }}", "it formats a text of more than"),
    "center": ("{{ 'a'|center(999999999) }}", "with a number above 10000000"),
    "ljust": ("{{ 'a'.ljust(999999999) }}", "with a number above 10000000"),
    "indent": ("{{ messages|tojson(indent=999999999) }}", "with a number above 10000000"),
    "replace": ("{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", "by replace"),
    "join": ("{{ ('a,' * 9999).split(',')|join('b' * 1000000) }}", "by join"),
    "output": (LOOP + "x" * 9999 + "{% endfor %}", "more than 10000000 characters"),
    "a block": ("{% set y %}" + LOOP + "x" * 9999 + "{% endfor %}{% endset %}", "fails on turns"),
    "Python's insides": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "a class": ("{{ ''.__class__.__mro__ }}", "fails on turns"),
    "a file": ("{% include '/etc/passwd' %}", "fails on turns"),
    "an import": ("{% import 'os' as os %}", "fails on turns"),
    "changes": ("{{ messages.append(1) }}", "fails on turns"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("template", "says"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_without_end_is_stopped(template, says):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="the tokenizer's chat template fails on turns of user") as caught:
        Chat(tokenizer).prompt([{"role": "user", "content": "hi"}])
    assert says in str(caught.value)
