"""Which stages every key of the configuration makes anew: each key changed alone, against a table written by hand.

A key that changes a result and not the name gives a wrong result later; one that changes the name and no result costs
hours. Nothing is computed here: a listing store names the artifacts of all experiments.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from mpo_jax.config.load import load_config
from mpo_jax.config.registry import EXPERIMENTS, Step
from mpo_jax.config.schema import TRAINED, Config, Section, TextConfig
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.recipe import FORMAT, artifact_name
from mpo_jax.pipeline.table import Listing
from mpo_jax.types import Artifact
from tests.models.tiny import RECORDED
from tests.pipeline.test_pipeline import MICRO

DPO, PPO = {"dpo_human", "dpo_all", "dpo_split"}, {"ppo_all", "ppo_split"}
ALL = {"sft", "reward", "select", "evaluate"} | DPO | PPO
SPLIT = {"dpo_split", "ppo_split"}
NONE: set[str] = set()
OF_STAGE = {"sft": {"sft"}, "reward": {"reward"}, "dpo": DPO, "ppo": PPO}
TLDR, OTHER_TLDR = "tldr.jsonl", "other.jsonl"
TEMPLATE = str(RECORDED / "tied" / "config.json")
"""Any file of text: templates are hashed here, and never rendered."""


def unit(experiment: str, role: str) -> str:
    """A stage's kind; of a step, with what it learns from: human pairs, all samples, or the easy or hard part."""
    number, _, kind = role.rpartition("-")
    if not number:
        return role
    step: Step = EXPERIMENTS[experiment][int(number) - 1]
    if step.subset != "all":
        return f"{kind}_split"
    return f"{kind}_human" if step.human_pairs else f"{kind}_all"


# the configurations in which keys are changed, as changes of micro.yaml

EPOCHS = {f"{stage}.train.steps": None for stage in TRAINED}
PLAIN: dict[str, Any] = {**EPOCHS, "select.threshold": 1.0, "select.easy_fraction": None}
"""The toy world, a model from scratch, the last state of every stage."""
METRICS = {"sft": "loss", "reward": "accuracy", "dpo": "rewards/margins", "ppo": "objective/scores"}
TRAINING_METRIC = {**PLAIN, **{f"{stage}.train.best_metric": metric for stage, metric in METRICS.items()}}
"""Every stage exports its best state by a metric of its training."""
HELD_OUT_METRIC = {
    **PLAIN,
    **{f"{stage}.train.best_metric": f"eval/{metric}" for stage, metric in METRICS.items()},
    **{f"{stage}.train.eval_every": 2 for stage in TRAINED},
}
"""Every stage exports its best state by a metric on held-out rows."""
FILES: dict[str, Any] = {
    **PLAIN, "model.path": str(RECORDED / "tied"), "data.kind": "tldr", "data.path": [TLDR],
}  # fmt: skip
"""Rows from files, and a base model."""
FINISHED_REWARD = {**PLAIN, "reward.path": str(RECORDED / "llama_score")}
"""A finished reward model in the place of a trained one."""
BASES = {
    "plain": PLAIN, "training metric": TRAINING_METRIC, "held-out metric": HELD_OUT_METRIC, "files": FILES,
    "finished reward model": FINISHED_REWARD,
}  # fmt: skip

# another value of every key; a test below fails where a key has none

OPTIM = {
    "learning_rate": 7e-4, "schedule": "constant", "warmup_steps": 3, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9,
    "eps": 1e-6, "clip_norm": 2.0,
}  # fmt: skip
TRAIN = {
    "epochs": 2.5, "steps": 7, "batch_size": 24, "accumulation": 2, "shuffle": False, "log_every": 3,
    "checkpoint_every": 5, "eval_every": 4, "eval_rows": 9, "keep_checkpoints": 3, "best_mode": "min",
    "stop_after_skipped": 8, **{f"optim.{key}": value for key, value in OPTIM.items()},
}  # fmt: skip
ADAPTER = {"rank": 4, "alpha": 8.0, "targets": "attention", "rslora": True}
OTHER: dict[str, Any] = {
    "workdir": "elsewhere", "seed": 5, "experiment": ["sft", "dpo"],
    "model.path": str(RECORDED / "untied"), "model.compute_dtype": "bfloat16", "model.frozen_dtype": "bfloat16",
    "model.adapter": {}, **{f"model.adapter.{key}": value for key, value in ADAPTER.items()},
    "model.remat": "full", "model.attention": "xla", "model.logit_chunk": 77,
    "model.architecture.hidden_size": 48, "model.architecture.intermediate_size": 64,
    "model.architecture.num_layers": 3, "model.architecture.num_heads": 8, "model.architecture.num_kv_heads": 4,
    "model.architecture.head_dim": 4, "model.architecture.max_positions": 99, "model.architecture.rope_theta": 5e5,
    "model.architecture.norm_eps": 1e-6, "model.architecture.tie_embeddings": False,
    "model.architecture.init_std": 0.03,
    "text.max_prompt_tokens": 41, "text.max_response_tokens": 17, "text.add_bos": "true",
    "text.prompt_template": "Q: {prompt}", "text.chat": True, "text.truncation": "start", "text.packed": False,
    "text.length_buckets": 2,
    "text.chat_template": TEMPLATE, "text.template_options": {"effort": "low"}, "text.fold_system": True,
    "text.end_markers": "keep",
    "data.kind": "pairs", "data.path": [OTHER_TLDR], "data.sft_path": [OTHER_TLDR], "data.test_path": [OTHER_TLDR],
    "data.prompt_path": [OTHER_TLDR], "data.test_prompt_path": [OTHER_TLDR], "data.prompts": "unique",
    "data.filter": "none", "data.keep_news": True, "data.validation_fraction": 0.1, "data.max_rows": 50,
    "data.columns": {"category": "subreddit"}, "data.order": "interleaved",
    "data.toy.seed": 3, "data.toy.num_demonstrations": 65, "data.toy.num_pairs": 49, "data.toy.num_test": 17,
    "data.toy.num_values": 5, "data.toy.num_attempts": 2, "data.toy.num_fillers": 1, "data.toy.label_temperature": 2.0,
    **{f"{stage}.train.{key}": value for stage in TRAINED for key, value in TRAIN.items()},
    "sft.skip": True, "sft.seed": 7, "reward.seed": 7,
    "sft.train.best_metric": "tokens", "reward.train.best_metric": "gap", "dpo.train.best_metric": "loss",
    "ppo.train.best_metric": "objective/kl",
    "reward.path": str(RECORDED / "qwen2_score"), "reward.init": "base", "reward.loss": "ds_span",
    "reward.label": "chosen",
    "reward.function": "json:dumps",  # any file: functions are hashed here, and never called
    "select.threshold": 2.0, "select.easy_fraction": 0.25, "select.pair_source": "human", "select.temperature": 0.5,
    "select.top_p": 0.9, "select.num_prompts": 8, "select.batch_size": 24,
    "dpo.beta": 0.2, "dpo.loss": "ipo", "dpo.loss_options": {"target_margin": 0.5}, "dpo.label_smoothing": 0.2,
    "dpo.length_normalised": True, "dpo.nll_coef": 0.1,
    **{f"ppo.critic_optim.{key}": value for key, value in OPTIM.items()},
    "ppo.epochs": 2, "ppo.minibatches": 2, "ppo.gamma": 0.9, "ppo.gae_lambda": 0.9, "ppo.clip_eps": 0.1,
    "ppo.value_clip_eps": 0.1, "ppo.score": "normalised", "ppo.score_clip": 4.0, "ppo.reward_at": "ds_chat",
    "ppo.greedy": True, "ppo.temperature": 0.5, "ppo.one_pass": True, "ppo.save_critic": False,
    "ppo.kl.coef": 0.3, "ppo.kl.adaptive": True, "ppo.kl.target": 5.0, "ppo.kl.horizon": 99.0, "ppo.kl.stop": 0.1,
    "ppo.extras.whiten_advantages": True, "ppo.extras.whiten_rewards": True, "ppo.extras.missing_eos": "replace",
    "ppo.extras.missing_eos_penalty": 2.0, "ppo.extras.ptx_coef": 0.1, "ppo.extras.ema_decay": 0.9,
    "ppo.extras.critic_warmup": 1,
    "evaluate.num_prompts": 5, "evaluate.batch_size": 24, "evaluate.greedy": True, "evaluate.temperature": 0.5,
    "evaluate.num_samples_shown": 3, "evaluate.bootstrap_resamples": 50,
    "table.seeds": [1, 2], "table.experiment": ["sft"], "table.thresholds": [0.5], "table.easy_fractions": [0.5],
    "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
    "runtime.cpu_devices": 4, "runtime.compilation_cache": "cache", "runtime.flags": "recommended",
    "runtime.token_cache": "tokens", "runtime.fingerprint_cache": "files", "runtime.tensorboard": False,
    "runtime.wandb": {}, "runtime.offload_frozen": True, "runtime.offload_moments": True,
    "runtime.keep_finished_checkpoints": True, "runtime.bucket": "file:///bucket",
    "runtime.save_dtype": "bfloat16", "runtime.keep": "last",
    "runtime.processes.coordinator": "host:1", "runtime.processes.count": 2, "runtime.processes.index": 1,
    "runtime.processes.timeout_s": 7, "runtime.save_minutes": 0.5, "runtime.compile_threads": 2,
    "runtime.wandb.project": "other", "runtime.wandb.entity": "team", "runtime.wandb.mode": "offline",
}  # fmt: skip

# what must be changed too, before and after, so that the key may be changed

NEEDS: dict[str, dict[str, Any]] = {
    "sft.skip": {"model.path": str(RECORDED / "tied")},
    "select.easy_fraction": {"select.threshold": None, "select.easy_fraction": 0.5},
    "dpo.loss_options": {"dpo.loss": "simpo"},
    "reward.function": {"reward.path": None},
    "runtime.wandb.project": {"runtime.wandb": {}},
    "runtime.wandb.entity": {"runtime.wandb": {}},
    "runtime.wandb.mode": {"runtime.wandb": {}},
    **{f"model.adapter.{key}": {"model.adapter": {}} for key in ADAPTER},
}

# the table: the units that a key makes anew by itself, in the plain configuration and where others differ from it.
# The longest prefix that fits counts.

BOOKKEEPING = ("log_every", "checkpoint_every", "eval_every", "eval_rows", "keep_checkpoints", "best_mode",
               "stop_after_skipped")  # fmt: skip
EXPECTED: dict[str, set[str]] = {
    "workdir": NONE, "experiment": NONE, "table": NONE, "mesh": NONE, "runtime": NONE,
    "runtime.save_dtype": {"sft", "reward"} | DPO | PPO,  # the stages that write a model
    "seed": ALL,
    "text": ALL,
    "model.path": {"sft", "reward"},  # the others read models that were made from it
    "model.compute_dtype": ALL, "model.frozen_dtype": ALL, "model.attention": ALL,
    "model.remat": NONE, "model.logit_chunk": NONE,
    "model.architecture": {"sft"},
    "model.adapter": {"reward"} | DPO | PPO,  # a model from scratch is trained whole
    "data": NONE,
    "sft.skip": {"sft"}, "sft.seed": {"sft"}, "reward.seed": {"reward"},
    "data.toy": ALL, "data.prompts": ALL, "data.validation_fraction": ALL,
    **{f"{stage}.train": units for stage, units in OF_STAGE.items()},
    **{f"{stage}.train.{key}": NONE for stage in TRAINED for key in BOOKKEEPING},
    "reward": {"reward"}, "reward.label": NONE,  # of a finished one
    "reward.function": {"reward", "select", "evaluate"} | PPO,  # all that call it
    "select": {"select"},
    "select.threshold": SPLIT, "select.easy_fraction": SPLIT,
    "select.num_prompts": {"select", "dpo_human", "ppo_all"},  # the steps without a selection
    "dpo": DPO,
    "dpo.label_smoothing": NONE,  # of another loss
    "ppo": PPO,
    "evaluate": {"evaluate"},
    "evaluate.num_samples_shown": NONE, "evaluate.bootstrap_resamples": NONE,
}  # fmt: skip
DIFFERENT: dict[str, dict[str, set[str]]] = {
    "plain": {},
    # states are compared at checkpoints, by means over logged lines
    "training metric": {
        f"{stage}.train.{key}": units
        for stage, units in OF_STAGE.items()
        for key in ("log_every", "checkpoint_every", "best_mode")
    },
    "held-out metric": {
        f"{stage}.train.{key}": units
        for stage, units in OF_STAGE.items()
        for key in ("eval_every", "eval_rows", "best_mode")
    },
    "files": {
        "data": ALL, "data.toy": NONE, "model.architecture": NONE, "model.adapter": {"sft", "reward"} | DPO | PPO,
    },
    "finished reward model": {
        "model.path": {"sft", "reward"}, "model.adapter": DPO | PPO,
        "reward.train": NONE, "reward.train.batch_size": {"reward"},  # in which it is measured
        "reward.init": NONE, "reward.loss": NONE, "reward.label": {"reward"},
    },
}  # fmt: skip
INSTEAD = {
    # the minimum is what best_metric=loss takes by itself
    ("training metric", "sft.train.best_mode"): "max",
    ("held-out metric", "sft.train.best_mode"): "max",
    ("held-out metric", "sft.train.best_metric"): "loss",  # SFT has but one on held-out rows
    ("held-out metric", "reward.train.best_metric"): "eval/gap",
    ("held-out metric", "dpo.train.best_metric"): "eval/loss",
    ("held-out metric", "ppo.train.best_metric"): "eval/objective/kl",
}
"""Other values, where the ones above would change nothing or leave the kind of metric."""
ONLY_FILES = tuple(f"data.{key}" for key in ("kind", "path", "sft_path", "test_path", "prompt_path",
                                             "test_prompt_path", "columns"))  # fmt: skip
"""Keys that cannot be changed alone in the toy world."""


def leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of the schema by its dotted name; of a section that may be absent, itself and those inside."""
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if inner is None or inner is not field.annotation:
            yield prefix + name
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")


KEYS = tuple(leaves(Config))


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values with these ones, by dotted names."""
    values = json.loads(json.dumps(values))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = copy.deepcopy(value)
    return values


@cache
def micro() -> dict[str, Any]:
    return load_config(MICRO).model_dump(mode="json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the files of rows are: they are hashed here, and never read as rows."""
    folder = tmp_path_factory.mktemp("names")
    (folder / TLDR).write_text('{"a": 1}\n')
    (folder / OTHER_TLDR).write_text('{"a": 2}\n')
    return folder


def configure(folder: Path, *changes: Mapping[str, Any]) -> Config:
    merged: dict[str, Any] = {}
    for one in changes:
        merged |= one
    here = {
        key: [str(folder / name) for name in value] if key in ONLY_FILES and key.endswith("path") else value
        for key, value in merged.items()
    }
    return Config.model_validate(changed(micro(), here))


@dataclasses.dataclass
class Made:
    """An artifact's name, what it is made from, and which unit it is of."""

    name: str
    unit: str
    own: Any
    parents: tuple[str, ...]


def listed(config: Config, folder: Path) -> dict[tuple[str, str], Made]:
    """Every artifact of every experiment, by experiment and role."""
    pipeline, found = Pipeline(config, Listing(folder / "nothing")), {}
    for experiment in EXPERIMENTS:
        for role, artifact in pipeline.experiment(experiment).artifacts.items():
            recipe = artifact.manifest
            own = json.dumps([recipe["settings"], recipe["inputs"]], sort_keys=True)
            parents = tuple(recipe["parents"].values())
            found[experiment, role] = Made(artifact.id, unit(experiment, role), own, parents)
    return found


def assert_changes(
    before: dict[tuple[str, str], Made], after: dict[tuple[str, str], Made], expected: set[str], what: str = ""
) -> None:
    """The units whose own recipe differs are these, and the names that differ theirs and their descendants'."""
    assert before.keys() == after.keys()
    own = {one.unit for place, one in before.items() if one.own != after[place].own}
    assert own == expected, what
    still = {one.unit for place, one in before.items() if one.own == after[place].own}
    assert not own & still, f"{what}: of one kind of stage, some are made anew and some are not"
    by_name = {one.name: one for one in before.values()}

    def anew(one: Made) -> bool:
        return one.unit in expected or any(anew(by_name[parent]) for parent in one.parents)

    for place, one in before.items():
        assert (one.name != after[place].name) == anew(one), (what, place)


def expected_units(base: str, key: str) -> set[str]:
    """The longest prefix in the table, those of the configuration before the general ones."""
    parts = key.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    fitting = [(prefix, table) for prefix in prefixes for table in (DIFFERENT[base], EXPECTED) if prefix in table]
    assert fitting, f"{key} is new: say in EXPECTED which stages it makes anew"
    prefix, table = fitting[0]
    return table[prefix]


@pytest.fixture(scope="module")
def known() -> dict[str, dict[tuple[str, str], Made]]:
    """Listings of configurations that many keys are compared with."""
    return {}


def test_every_key_has_another_value():
    assert set(OTHER) - set(KEYS) == set(), "no such keys any more"
    assert set(KEYS) - set(OTHER) == set(), "new keys: give each another valid value in OTHER"
    assert len(set(KEYS)) == len(KEYS) > 180


def test_the_names_of_all_units_are_compared(folder):
    assert {one.unit for one in listed(configure(folder, PLAIN), folder).values()} == ALL


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changed_alone(key, folder, known):
    """Under every one of the base configurations."""
    for base, changes in BASES.items():
        if base != "files" and key in ONLY_FILES:
            with pytest.raises(ValueError, match=r"names (columns of )?files|needs data\.path"):
                configure(folder, changes, {key: OTHER[key]})
            continue
        needs = NEEDS.get(key, {})
        value = INSTEAD.get((base, key), OTHER[key])
        name = f"{base} {json.dumps(needs)}"
        if name not in known:
            known[name] = listed(configure(folder, changes, needs), folder)
        before, after = (configure(folder, changes, needs, more) for more in ({}, {key: value}))
        assert before != after, f"{base}: {key}={value} is what it has: give another value in OTHER or INSTEAD"
        assert_changes(known[name], listed(after, folder), expected_units(base, key), f"{key} of {base}")


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        # a number of steps comes before epochs
        ({**PLAIN, "sft.train.steps": 6}, {"sft.train.epochs": 3.0}, NONE),
        ({**PLAIN, "ppo.train.steps": 6}, {"ppo.train.epochs": 3.0}, NONE),
        # a reward model that starts from a base model from scratch has its sizes
        ({**PLAIN, "reward.init": "base"}, {"model.architecture.num_layers": 3}, {"sft", "reward"}),
        ({**FILES, "reward.init": "base"}, {"model.architecture.num_layers": 3}, NONE),
        # how far the mean of a training metric reaches is nothing to a metric on held-out rows, and the reverse
        (TRAINING_METRIC, {"sft.train.eval_every": 4}, NONE),
        (HELD_OUT_METRIC, {"sft.train.checkpoint_every": 5}, NONE),
        (HELD_OUT_METRIC, {"dpo.train.log_every": 5}, NONE),
        # what best_metric takes by itself
        (TRAINING_METRIC, {"sft.train.best_mode": "min"}, NONE),
        (TRAINING_METRIC, {"reward.train.best_mode": "max"}, NONE),
        # auto is what it stands for on this machine
        (PLAIN, {"model.compute_dtype": "float32"}, NONE),
        (PLAIN, {"model.frozen_dtype": "float32"}, NONE),
        (PLAIN, {"model.attention": "blocked"}, NONE),
        (PLAIN, {"runtime.save_dtype": "float32"}, NONE),
        # losses and their own options; one that is left out has the loss's default
        ({**PLAIN, "dpo.loss": "cdpo"}, {"dpo.label_smoothing": 0.2}, DPO),
        ({**PLAIN, "dpo.loss": "simpo"}, {"dpo.label_smoothing": 0.2}, NONE),
        ({**PLAIN, "dpo.loss": "simpo"}, {"dpo.loss_options": {"target_margin": 1.0}}, NONE),
        ({**PLAIN, "dpo.loss": "simpo"}, {"dpo.loss_options": {"target_margin": 1.5}}, DPO),
        ({**PLAIN, "dpo.loss": "cdpo"}, {"dpo.loss_options": {"label_smoothing": 0.3}}, DPO),
        # where pairs are split
        (PLAIN, {"select.threshold": None, "select.easy_fraction": 0.5}, SPLIT),
        # the toy world has no files
        (PLAIN, {"data.max_rows": 3, "data.filter": "none", "data.keep_news": True}, NONE),
    ],
)  # fmt: skip
def test_what_a_key_does_depends_on_others(base, change, expected, folder):
    before, after = configure(folder, base), configure(folder, base, change)
    assert before != after
    assert_changes(listed(before, folder), listed(after, folder), expected)


def test_files_count_by_content_and_not_by_name(folder, tmp_path):
    before = listed(configure(folder, FILES), folder)
    (tmp_path / "renamed.jsonl").write_bytes((folder / TLDR).read_bytes())
    moved = configure(folder, FILES, {"data.path": [str(tmp_path / "renamed.jsonl")]})
    assert_changes(before, listed(moved, folder), NONE)
    (tmp_path / "renamed.jsonl").write_text('{"a": 3}\n')
    assert_changes(before, listed(moved, folder), ALL)


def test_chat_templates_count_by_content_and_not_by_name(folder, tmp_path):
    before = listed(configure(folder, FILES, {"text.chat_template": TEMPLATE}), folder)
    file = Path(shutil.copy(TEMPLATE, tmp_path / "renamed.jinja"))
    moved = configure(folder, FILES, {"text.chat_template": str(file)})
    assert_changes(before, listed(moved, folder), NONE)
    file.write_text("another")
    assert_changes(before, listed(moved, folder), ALL)


def test_keys_that_are_newer_than_a_recipe_are_left_out_at_their_defaults(folder):
    """So that stages which were made before there were such keys keep their names."""
    for made in listed(configure(folder, PLAIN), folder).values():
        text = json.loads(made.own)[0]["text"]
        newer = {"chat_template", "template_options", "fold_system", "end_markers"}
        assert not text.keys() & newer
        assert text.keys() == TextConfig.model_fields.keys() - newer


def test_models_count_by_content_and_not_by_name(folder, tmp_path):
    base = {**FILES, "reward.path": str(RECORDED / "llama_score")}
    before = listed(configure(folder, base), folder)
    sources = {"model.path": ("tied", {"sft", "reward"}), "reward.path": ("llama_score", {"reward"})}
    for key, (source, expected) in sources.items():
        other = Path(shutil.copytree(RECORDED / source, tmp_path / source))
        moved = configure(folder, base, {key: str(other)})
        assert_changes(before, listed(moved, folder), NONE)
        (other / "config.json").write_bytes((other / "config.json").read_bytes() + b"\n")
        assert_changes(before, listed(moved, folder), expected)


def test_a_recipe_is_all_that_a_name_hashes(folder):
    """The format too: what an older version of the package made is not taken for this one's."""
    artifact: Artifact = Pipeline(configure(folder, PLAIN), Listing(folder / "nothing")).sft()
    recipe = artifact.manifest
    assert list(recipe) == ["format", "stage", "settings", "inputs", "parents"] and recipe["format"] == FORMAT
    assert artifact.id == artifact_name(recipe) == artifact_name(dict(reversed(recipe.items())))
    assert artifact_name({**recipe, "format": FORMAT + 1}) != artifact.id
