"""mpo_jax.pipeline.preflight: what is wrong with a run's inputs, batches or memory is said before its first stage."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.data import toy
from mpo_jax.data.corpus import FIRST_ROWS
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.forward import Model, abstract_params
from mpo_jax.models.hf.safetensors_folder import SafetensorsFolder
from mpo_jax.pipeline import preflight
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.recipe import artifact_name
from mpo_jax.pipeline.table import Listing
from mpo_jax.runtime import machine
from mpo_jax.types import trainable
from tests.models.tiny import random_params
from tests.pipeline.test_pipeline import MICRO, mpo

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`policy` and `reward`: tiny models with the toy world's tokenizer; `rows.jsonl`: pairs."""
    folder = tmp_path_factory.mktemp("models")
    config = load_config(MICRO)
    codec = TextCodec(toy.make_tokenizer(), config.text)
    decoder = loading.scratch_sizes(config.model.architecture, codec.vocab_size)
    for name, head in (("policy", "lm"), ("reward", "value")):
        params = trainable(random_params(decoder, head=head))
        loading.save(folder / name, Model(decoder), params, codec.tokenizer)
    (folder / "rows.jsonl").write_text(json.dumps(PAIR) + "\n")
    return folder


@pytest.fixture
def broken(models, tmp_path) -> Path:
    """A copy of them to break."""
    return Path(shutil.copytree(models, tmp_path / "models"))


def configure(folder: Path, *overrides: str):
    given = ("data.kind=pairs", f"data.path={folder}/rows.jsonl", f"model.path={folder}/policy")
    return load_config(MICRO, (*given, f"reward.path={folder}/reward", *overrides))


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_sound_inputs_pass_and_no_weights_are_read(models, monkeypatch):
    monkeypatch.setattr(SafetensorsFolder, "read", lambda *_: pytest.fail("reads weights"))
    preflight.check_inputs(configure(models))
    preflight.check_inputs(load_config(MICRO))


def rename_words(folder: Path) -> None:
    """The same words under other numbers."""
    tokenizer = json.loads((folder / "reward" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[" my"], vocab[" boss"] = vocab[" boss"], vocab[" my"]
    (folder / "reward" / "tokenizer.json").write_text(json.dumps(tokenizer))


def talk(folder: Path) -> None:
    """Conversations, which the policy's template renders, and a reward model of other tokens that has none."""
    rename_words(folder)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    edit(folder / "policy" / "tokenizer_config.json", chat_template=template)
    said = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    (folder / "rows.jsonl").write_text(json.dumps(said) + "\n")


def cut_off(folder: Path) -> None:
    path = folder / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def strip_reward_model(folder: Path) -> None:
    rename_words(folder)
    edit(folder / "reward" / "config.json", vocab_size=8)


def swap_heads(folder: Path) -> None:
    (folder / "policy").rename(folder / "p")
    (folder / "reward").rename(folder / "policy")
    (folder / "p").rename(folder / "reward")


FAULTS = {
    "no policy": (lambda f: shutil.rmtree(f / "policy"), r"model\.path=.*policy: no model at"),
    "no reward model": (lambda f: shutil.rmtree(f / "reward"), r"reward\.path=.*reward: no model at"),
    "no chat template": (talk, r"reward\.path=.*reward has a tokenizer of its own without a chat template"),
    "policy's architecture": (
        lambda f: edit(f / "policy" / "config.json", model_type="gpt2"),
        r"model\.path=.*model_type 'gpt2' is not supported",
    ),
    "reward model's architecture": (
        lambda f: edit(f / "reward" / "config.json", model_type="gpt2"),
        r"reward\.path=.*model_type 'gpt2' is not supported",
    ),
    "policy's context": (
        lambda f: edit(f / "policy" / "config.json", max_position_embeddings=32),
        r"model\.path=.*= 56, but the model has 32 positions",
    ),
    "reward model's context": (
        lambda f: edit(f / "reward" / "config.json", max_position_embeddings=32),
        r"reward\.path=.*= 56, but the model has 32 positions",
    ),
    "fewer layers": (
        lambda f: edit(f / "reward" / "config.json", num_hidden_layers=1),
        r"reward\.path=.*a llama model of 1 layers has no place for",
    ),
    "embedding": (
        lambda f: edit(f / "policy" / "config.json", vocab_size=8),
        r"model\.path=.*embed_tokens\.weight has shape \(176, 32\), but config\.json asks for \(8, 32\)",
    ),
    "reward model's own embedding": (strip_reward_model, r"reward\.path=.*reward: .*has shape \(176, 32\), but config"),
    "no tokenizer": (
        lambda f: (f / "policy" / "tokenizer.json").unlink(),
        r"model\.path=.*holds no tokenizer\.json",
    ),
    "no reward tokenizer": (
        lambda f: (f / "reward" / "tokenizer.json").unlink(),
        r"reward\.path=.*holds no tokenizer\.json",
    ),
    "cut off": (cut_off, r"model\.path=.*model\.safetensors: broken safetensors file"),
    "heads": (swap_heads, r"model\.path=.*this is a reward model, not a language model"),
    "rows": (lambda f: (f / "rows.jsonl").write_text('{"prompt": "a"}\n'), r"data\.path: .*rows\.jsonl:1: .*'chosen'"),
    "no rows": (lambda f: (f / "rows.jsonl").unlink(), r"data\.path: no data file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_key_named(broken, fault):
    spoil, message = FAULTS[fault]
    spoil(broken)
    loading.local_model.cache_clear()
    with pytest.raises(UserError, match=message):
        preflight.check_inputs(configure(broken))


@pytest.mark.parametrize("key", ["sft_path", "test_path", "prompt_path", "test_prompt_path"])
def test_every_file_is_read_under_the_reader_of_its_key(models, tmp_path, key):
    """Rows of the wrong kind, and the right ones of each."""
    right = {"sft_path": {"prompt": "a", "response": "b"}, "test_path": PAIR}.get(key, {"prompt": "a"})
    wrong = {"completion": "x"} if "prompt_path" in key else {"prompt": "a"}
    for row in (right, wrong):
        (tmp_path / "more.jsonl").write_text(json.dumps(row) + "\n")
        config = configure(models, f"data.{key}={tmp_path}/more.jsonl")
        if row is right:
            preflight.check_inputs(config)
        else:
            with pytest.raises(UserError, match=rf"data\.{key}: .*more\.jsonl:1: "):
                preflight.check_inputs(config)


TUNED = "reward: {train: {batch_size: 32, optim: {learning_rate: 2.0e-5}}}"
NEITHER = "reward.loss=ds_span", "reward.train.optim.learning_rate=1e-3", "reward.train.batch_size=4"


@pytest.mark.parametrize(
    ("file", "overrides", "said"),
    [
        (TUNED, ("reward.path={reward}",), ""),
        (
            TUNED,
            ("reward.path={reward}", *NEITHER),
            "reward.loss, reward.train.optim.learning_rate: no effect since reward.path is given\n",
        ),
        (
            "reward: {path: {reward}, train: {batch_size: 32, optim: {learning_rate: 2.0e-5}}}",
            (),
            "reward.train.optim.learning_rate: no effect since reward.path is given\n",
        ),
        ("", NEITHER, ""),
        ("reward: {label: 1}", (), "reward.label: no effect without reward.path\n"),
        ("reward: {label: 0}", ("reward.path={reward}",), ""),
    ],
    ids=["a preset", "the command line", "one file", "a trained one", "a label", "a label that counts"],
)
def test_settings_without_effect_are_said_where_the_user_has_made_them(models, tmp_path, capsys, file, overrides, said):
    of = lambda text: text.replace("{reward}", f"{models}/reward")  # noqa: E731
    (tmp_path / "merged.yaml").write_text(of(file) or "{}")
    rows = ("data.kind=pairs", f"data.path={models}/rows.jsonl", f"model.path={models}/policy")
    config = load_config(MICRO, (f"{tmp_path}/merged.yaml", *rows, *map(of, overrides)))
    codec, _ = preflight.check_base(config)
    capsys.readouterr()
    preflight.check_reward(config, codec, None)
    assert capsys.readouterr().out == said


def test_only_the_first_rows_are_read(models, tmp_path):
    rows = [json.dumps(PAIR)] * FIRST_ROWS
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "broken"]))
    preflight.check_inputs(configure(models, f"data.path={tmp_path}/rows.jsonl"))


def test_what_no_requested_stage_reads_is_left_out(broken):
    shutil.rmtree(broken / "reward")
    preflight.check_inputs(configure(broken), "sft")
    with pytest.raises(UserError, match=r"reward\.path"):
        preflight.check_inputs(configure(broken), "reward")


@pytest.mark.parametrize("command", ["run", "ppo", "table"])
def test_nothing_is_made_where_a_later_stage_s_input_is_wrong(broken, tmp_path, command, capsys):
    swap = ("data.kind=toy", "data.path=[]", f"reward.path={broken}/policy")
    more = ("seeds=0",) if command == "table" else ()
    given = (f"model.path={broken}/policy", f"workdir={tmp_path}/w", *swap, *more)
    assert mpo(command, MICRO, *given) == 2
    assert "is not a reward model: it has no tensor score.weight" in capsys.readouterr().err
    assert not list(tmp_path.glob("w/**/stages/*"))


@pytest.mark.parametrize("command", ["run", "table", "evaluate"])
def test_rows_that_hold_out_no_prompt_are_refused_before_training(models, tmp_path, command, capsys):
    rows = [{**PAIR, "prompt": f"p {number}"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("data.kind=pairs", f"data.path={tmp_path}/rows.jsonl", f"model.path={models}/policy")
    more = ("seeds=0", "experiment=sft") if command == "table" else ("experiment=sft",)
    too_few = ("data.validation_fraction=1.0e-5", f"workdir={tmp_path}/w")
    assert mpo(command, MICRO, *given, *too_few, *more) == 2
    said = capsys.readouterr()
    assert "no test prompts to evaluate policies on: raise data.validation_fraction, name data.test_path" in said.err
    assert "make sft" in said.out and not list(tmp_path.glob("w/**/metrics.jsonl"))
    assert not list(tmp_path.glob("w/**/manifest.json"))


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("run", "sft.train.batch_size"), ("run", "reward.train.batch_size"), ("run", "select.batch_size"),
        ("run", "dpo.train.batch_size"), ("run", "ppo.train.batch_size"), ("run", "evaluate.batch_size"),
        ("ppo", "ppo.train.batch_size"), ("table", "ppo.train.batch_size"),
    ],
)  # fmt: skip
def test_every_stage_s_batch_is_compared_with_the_mesh_before_the_first(tmp_path, command, key, capsys):
    more = ("seeds=0", "experiment=mpo") if command == "table" else ()
    assert mpo(command, MICRO, f"workdir={tmp_path}", "mesh.fsdp=8", f"{key}=12", *more) == 2
    said = capsys.readouterr()
    assert f"{key}=12" in said.err and "not divide over mesh.data=1 x mesh.fsdp=8 = 8 devices" in said.err
    assert "make " not in said.out and not list(tmp_path.glob("**/stages/*"))


def test_a_stage_that_is_not_asked_for_is_not_checked(tmp_path):
    config = load_config(MICRO, (f"workdir={tmp_path}", "mesh.fsdp=8", "ppo.train.batch_size=12"))
    pipeline = Pipeline(config, Listing(tmp_path))
    preflight.check_missing(pipeline, ["mpo"], "dpo", inputs_checked=False)
    with pytest.raises(UserError, match=r"ppo\.train\.batch_size=12"):
        preflight.check_missing(pipeline, ["mpo"], "ppo", inputs_checked=False)


def test_a_finished_run_is_not_checked(tmp_path, monkeypatch):
    """It needs neither its inputs' rows nor as many devices."""
    config = load_config(MICRO, (f"workdir={tmp_path}", "mesh.fsdp=64"))
    pipeline = Pipeline(config, Listing(tmp_path))
    assert preflight.check_fresh(config)
    for artifact in pipeline.experiment("mpo").artifacts.values():
        folder = tmp_path / "stages" / artifact_name(artifact.manifest)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({**artifact.manifest, "seconds": 1.0}))
    monkeypatch.setattr(preflight, "check_inputs", lambda *_: pytest.fail("reads inputs"))
    assert not preflight.check_fresh(config)
    preflight.check_missing(pipeline, ["mpo"], inputs_checked=False)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"needs 64 devices, but there are 8"):
        preflight.check_missing(pipeline, ["mpo", "ppo"], inputs_checked=False)


def test_too_little_memory_for_offloading_is_an_error(tmp_path, monkeypatch):
    """The moments alone, by hand: two in float32 for each of two models, and twice."""
    given = ("runtime.offload_frozen=true", "runtime.offload_moments=true", "model.frozen_dtype=bfloat16")
    config = load_config(MICRO, (f"workdir={tmp_path}", "mesh.fsdp=8", *given))
    decoder = preflight.check_base(config)[1]
    count = lambda head: sum(x.size for x in jax.tree.leaves(abstract_params(decoder, head=head)))  # noqa: E731
    moments = 4 * 2 * (count("lm") + count("value")) * 2
    pipeline = Pipeline(config, Listing(tmp_path))
    monkeypatch.setattr(machine, "host_memory", lambda: moments)
    with pytest.raises(UserError, match=r"runtime\.offload_frozen=true and runtime\.offload_moments=true: .* needed"):
        preflight.check_missing(pipeline, ["mpo"], inputs_checked=False)
    # small arrays are whole on every device, so the host holds some more than one copy
    monkeypatch.setattr(machine, "host_memory", lambda: 2 * moments)
    preflight.check_missing(pipeline, ["mpo"], inputs_checked=False)
    preflight.check_missing(pipeline, ["dpo"], inputs_checked=False)


def test_a_disk_too_small_for_the_models_is_an_error_before_the_first_stage(tmp_path, monkeypatch):
    """By hand: SFT, DPO and PPO leave a language model each, the reward stage one with its head."""
    config = load_config(MICRO, (f"workdir={tmp_path}", "runtime.save_dtype=bfloat16"))
    decoder = preflight.check_base(config)[1]
    count = lambda head: sum(x.size for x in jax.tree.leaves(abstract_params(decoder, head=head)))  # noqa: E731
    models = 2 * (3 * count("lm") + count("value"))
    pipeline = Pipeline(config, Listing(tmp_path))
    free = lambda number: SimpleNamespace(free=number)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free(models))
    preflight.check_missing(pipeline, ["mpo"], inputs_checked=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free(models - 1))
    with pytest.raises(UserError, match=r"its disk has .* free, and the models of the 4 stages .*runtime\.keep=last"):
        preflight.check_missing(pipeline, ["mpo"], inputs_checked=False)
    last = Pipeline(load_config(MICRO, (f"workdir={tmp_path}", "runtime.keep=last")), Listing(tmp_path))
    preflight.check_missing(last, ["mpo"], inputs_checked=False)
