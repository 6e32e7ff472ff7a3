"""mpo_jax.config.schema: what is read, merged and refused, and what the refusals say."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from mpo_jax.config.load import load_config, read_record, to_yaml
from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def value_at(config: BaseModel, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def sections(config: BaseModel):
    yield config
    for name in type(config).model_fields:
        if isinstance(part := getattr(config, name), BaseModel):
            yield from sections(part)


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load(tmp_path, "") == Config()
    assert load(tmp_path, "# nothing\n") == Config()


def test_a_training_command_s_short_keys_are_its_stage_s(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dpo: {train: {steps: 3}}", encoding="utf-8")
    config = load_config(path, ("train.steps=7", "train.optim.learning_rate=0.5"), stage="dpo")
    assert (config.dpo.train.steps, config.dpo.train.optim.learning_rate) == (7, 0.5)
    assert config.sft == Config().sft
    with pytest.raises(UserError, match=r"dpo\.train\.stepz on the command line; did you mean steps"):
        load_config(path, ("train.stepz=7",), stage="dpo")


def test_a_section_that_is_given_in_part_keeps_its_stage_s_defaults(tmp_path):
    config = load(tmp_path, "dpo: {train: {batch_size: 8, optim: {beta1: 0.8}}}", "ppo.train.optim.learning_rate=0")
    assert (config.dpo.train.optim.learning_rate, config.dpo.train.optim.beta1) == (5e-6, 0.8)
    assert (config.ppo.train.optim.learning_rate, config.ppo.train.optim.weight_decay) == (0.0, 0.1)
    assert load(tmp_path, to_yaml(config)) == config


def test_files_without_a_kind_hold_pairs_and_are_never_left_aside_for_the_toy_world(tmp_path):
    """Else a user who names only model and data would train on the toy world."""
    assert load(tmp_path, "data: {path: a.jsonl}").data.kind == "pairs"
    assert load(tmp_path, "data: {kind: hh, path: a.jsonl}").data.kind == "hh"
    with pytest.raises(UserError, match=r"data\.kind=pairs needs data\.path"):
        load(tmp_path, "data: {test_path: a.jsonl}")
    for key in ("path", "sft_path", "test_path", "prompt_path", "test_prompt_path"):
        with pytest.raises(UserError, match=rf"data\.{key} names files: say how to read them, data\.kind=hh"):
            load(tmp_path, f"data: {{kind: toy, {key}: a.jsonl}}")


def test_best_is_lower_where_less_is_better_and_must_be_measured(tmp_path):
    best = lambda metric: load(tmp_path, "ppo: {train: {eval_every: 1}}", f"ppo.train.best_metric={metric}").ppo.train  # noqa: E731
    assert best("eval/objective/scores").better == "max"
    assert best("eval/objective/score_clipfrac").better == best("eval/objective/kl").better == "min"
    keys = ("dpo.train.eval_every=1", "dpo.train.best_metric=eval/loss/nll")
    with pytest.raises(UserError, match="is no measure of dpo"):
        load(tmp_path, "", *keys)
    assert load(tmp_path, "dpo: {nll_coef: 0.1}", *keys).dpo.train.better == "min"


def test_each_stage_is_measured_where_it_has_rows_that_it_does_not_train_on(tmp_path):
    """With test prompts alone, SFT and DPO train on all pairs; the reward model has its validation rows."""
    data = "data: {kind: pairs, path: a.jsonl, test_prompt_path: b.jsonl}"
    for stage in ("reward", "ppo"):
        load(tmp_path, data, f"{stage}.train.eval_every=1")
    for stage in ("sft", "dpo"):
        with pytest.raises(UserError, match=rf"{stage}\.train\.eval_every=1 needs held-out rows"):
            load(tmp_path, data, f"{stage}.train.eval_every=1")


@pytest.mark.parametrize("key", ["train.steps", "train"])
def test_elsewhere_a_short_key_is_an_error_that_asks_for_the_stage(tmp_path, key):
    with pytest.raises(UserError, match=rf"which stage's\? Write sft\.{key} or reward.*mpo sft, reward, dpo, ppo"):
        load(tmp_path, "", f"{key}=7")


def test_every_section_is_frozen_and_refuses_unknown_keys():
    found = list(sections(Config()))
    assert len(found) >= 20
    for section in found:
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(section).model_validate({"no_such_key": 1})


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("seed=7", "seed", 7),
        ("ppo.kl.coef=0.0", "ppo.kl.coef", 0.0),
        ("sft.train.optim.learning_rate=0", "sft.train.optim.learning_rate", 0.0),
        ("select.threshold=0.0", "select.threshold", 0.0),
        ("ppo.gamma=0", "ppo.gamma", 0.0),
        ("data.validation_fraction=0", "data.validation_fraction", 0.0),
        ("data.toy.num_fillers=0", "data.toy.num_fillers", 0),
        ("dpo.train.optim.learning_rate=3e-6", "dpo.train.optim.learning_rate", 3e-6),
        ("dpo.train.optim.clip_norm=null", "dpo.train.optim.clip_norm", None),
        ("workdir=runs/a=b", "workdir", "runs/a=b"),
        ("text.add_bos=true", "text.add_bos", "true"),
        ("text.add_bos=auto", "text.add_bos", "auto"),
        ("experiment=dpo", "experiment", ("dpo",)),
        ("experiment=sft,dpo_base", "experiment", ("sft", "dpo_base")),
        ("experiment=sft, dpo_base", "experiment", ("sft", "dpo_base")),
        ("experiment=[mpo,mpo_sft_kl]", "experiment", ("mpo", "mpo_sft_kl")),
        ("table.thresholds=1.5", "table.thresholds", (1.5,)),
        ("table.thresholds=[1.5,2]", "table.thresholds", (1.5, 2.0)),
        ("select={threshold: null, easy_fraction: 0.0}", "select.easy_fraction", 0.0),
    ],
)
def test_an_override_sets_its_key_and_nothing_else(tmp_path, override, key, expected):
    """Explicit zeros included, which `value or default` would lose."""
    config = load(tmp_path, "", override)
    given = value_at(config, key)
    assert (given, type(given)) == (expected, type(expected))
    changed = {name for name, value in flatten(config).items() if value != flatten(Config())[name]}
    assert changed <= {key, "select.threshold"}


def flatten(config: BaseModel, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name in type(config).model_fields:
        part = getattr(config, name)
        flat |= flatten(part, f"{prefix}{name}.") if isinstance(part, BaseModel) else {f"{prefix}{name}": part}
    return flat


def test_a_list_in_yaml_and_a_boolean_bos(tmp_path):
    config = load(tmp_path, "experiment: [sft, ppo]\ntext: {add_bos: false}\n")
    assert config.experiment == ("sft", "ppo")
    assert config.text.add_bos == "false"


def test_easy_fraction_alone_switches_the_threshold_off(tmp_path):
    select = load(tmp_path, "select: {easy_fraction: 0.25}").select
    assert (select.threshold, select.easy_fraction) == (None, 0.25)
    select = load(tmp_path, "select: {threshold: 2}", "select.threshold=null", "select.easy_fraction=0").select
    assert (select.threshold, select.easy_fraction) == (None, 0.0)


def test_labelled_pairs_have_gaps_below_0(tmp_path):
    human = load(tmp_path, "", "select.threshold=-1", "select.pair_source=human", "table.thresholds=-2")
    assert human.select.threshold == -1


def test_files_and_keys_merge_in_order(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("seed: 2\nppo: {kl: {coef: 0.3}, gamma: 0.5}\n", encoding="utf-8")
    base = "seed: 1\nppo: {kl: {coef: 0.1, horizon: 50.0}, gae_lambda: 0.9}\n"
    ppo = load(tmp_path, base, str(more)).ppo
    assert (ppo.kl.coef, ppo.kl.horizon, ppo.gamma, ppo.gae_lambda) == (0.3, 50.0, 0.5, 0.9)
    assert load(tmp_path, base, str(more), "seed=3").seed == 3
    assert load(tmp_path, base, "seed=3", str(more)).seed == 2
    assert load(tmp_path, base, str(more), "ppo.kl.coef=0.0").ppo.kl.coef == 0.0
    assert load(tmp_path, "data: {kind: pairs, path: [a, b]}", "data.path=[c]").data.path == ("c",)


REFUSED = {
    "unknown key": ("sed: 1\n", (), ["unknown key sed in {file}", "did you mean seed?"]),
    "unknown nested key": ("ppo: {kl: {ceof: 1}}\n", (), ["ppo.kl.ceof in {file}", "did you mean coef?"]),
    "unknown key, override": ("", ("ppo.kl.ceof=1",), ["ppo.kl.ceof on the command line", "did you mean coef?"]),
    "unknown section, override": ("", ("poo.kl=1",), ["unknown key poo on the command line", "did you mean ppo?"]),
    "nothing near": ("", ("mesh.zzz=1",), ["unknown key mesh.zzz", "known here: data, fsdp, tensor"]),
    "value taken for a section": ("", ("seed.x=1",), ["seed.x", "this key holds a value, not a section"]),
    "several faults at once": (
        "sed: 1\nppo: {gae_lambda: 2}\n", (), ["unknown key sed", "ppo.gae_lambda: ", "(given: 2)"]
    ),
    "wrong type": ("seed: many\n", (), ["{file}: seed: ", "integer", "(given: 'many')"]),
    "wrong type, override": ("", ("sft.train.batch_size=8.5",), ["sft.train.batch_size: ", "(given: 8.5)"]),
    "section given a value": ("ppo: 3\n", (), ["{file}: ppo: ", "dictionary"]),
    "out of range": ("", ("ppo.gae_lambda=1.5",), ["ppo.gae_lambda: ", "less than or equal to 1", "(given: 1.5)"]),
    "not finite": ("", ("ppo.kl.coef=.nan",), ["ppo.kl.coef: ", "finite"]),
    "not a choice": ("", ("experiment=sft,nope",), ["experiment.1: ", "'mpo_sft_kl'", "(given: 'nope')"]),
    "broken YAML": ("seed: 1\na: [1\nb: 2\n", (), ["{file}:3: broken YAML: "]),
    "tab": ("seed: 1\nppo:\n\t- 1\n", (), ["{file}:3: broken YAML: "]),
    "key twice": ("seed: 1\n\nseed: 2\n", (), ["{file}:3: broken YAML: found duplicate key seed"]),
    "list": ("- seed\n", (), ["{file}: a configuration is a mapping"]),
    "broken override": ("", ("seed=[1",), ["cannot read the override 'seed=[1'"]),
    "broken interpolation": ("workdir: ${nowhere}\n", (), ["{file}: ", "nowhere"]),
    "both splits": ("select: {easy_fraction: 0.5, threshold: 1}\n", (), ["select.threshold and select.easy_fraction"]),
    "no split": ("", ("select.threshold=null",), ["one of select.threshold and select.easy_fraction must be given"]),
    "a run twice": ("experiment: [mpo, mpo]\n", (), ["experiment: names mpo more than once"]),
    "no run": ("experiment: []\n", (), ["experiment: names no run"]),
    "a table's run twice": ("", ("table.experiment=sft,mpo,sft",), ["table.experiment: names sft more than once"]),
    "a seed too large": ("", ("table.seeds=0,2147483648",), ["table.seeds: must be different whole numbers"]),
    "no workdir": ('workdir: ""\n', (), ["{file}: workdir: must name a folder"]),
    "a threshold below all gaps": ("", ("select.threshold=-1",), ["select.threshold=-1 makes every pair easy"]),
    "a table's threshold below all gaps": ("", ("table.thresholds=1,-2",), ["table.thresholds has -2"]),
    "accumulation": ("sft: {train: {batch_size: 9, accumulation: 2}}\n", (),
                     ["{file}: sft.train: batch_size=9", "accumulation=2"]),
    "minibatches": ("ppo: {train: {batch_size: 12, accumulation: 2}, minibatches: 4}\n", (),
                    ["ppo: train.batch_size=12", "minibatches=4 x train.accumulation=2"]),
    "files without a path": ("", ("data.kind=hh",), ["data.kind=hh needs data.path"]),
    "template": ("text: {prompt_template: hello}\n", (), ["text.prompt_template: must hold {prompt} exactly once"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "says"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_place_and_the_fault(tmp_path, text, overrides, says):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    for part in says:
        assert part.replace("{file}", str(tmp_path / "run.yaml")) in str(caught.value)


def test_a_label_is_named_by_its_number_too():
    assert load_config(None, ("reward.label=1",)).reward.label == "1"
    with pytest.raises(UserError, match=r"reward\.label"):
        load_config(None, ("reward.label=true",))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "tldr.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"no configuration file .*tldt\.yaml; did you mean .*tldr\.yaml\?"):
        load_config(tmp_path / "tldt.yaml")
    with pytest.raises(UserError, match=r"no configuration file .*123\.yaml$"):
        load_config(tmp_path / "tldr.yaml", (str(tmp_path / "123.yaml"),))
    with pytest.raises(UserError, match=r"exported is neither KEY=VALUE nor a configuration file \(YAML\) that exists"):
        load_config(tmp_path / "tldr.yaml", (str(tmp_path / "exported"),))
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("workdir: f\xfcr\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*latin\.yaml"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- seed\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"list\.yaml: a configuration is a mapping"):
        load_config(tmp_path / "tldr.yaml", (str(tmp_path / "list.yaml"),))


def test_the_paper_divisions_are_accepted(tmp_path):
    config = load(tmp_path, "ppo: {train: {batch_size: 64, accumulation: 4}, minibatches: 2}\nmesh: {data: 2, fsdp: 4}")
    assert (config.mesh.num_devices, config.mesh.batch_shards) == (8, 8)
    assert config.model_copy(update={"seed": 5}).seed == 5


SECRET = "hunter2-not-for-logs"


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:MPO_TEST_SECRET}",
        "a ${oc.env:MPO_TEST_SECRET,none} b",
        "${oc.env:${model.path}}",
        "${oc.${seed}:MPO_TEST_SECRET}",
        "${oc.decode:${oc.env:MPO_TEST_SECRET}}",
        "${oc.select:seed}",
        "${oc.create:{a: 1}}",
        "${mpo_test_own:1}",
        "\\\\${oc.env:MPO_TEST_SECRET}",
    ],
)
@pytest.mark.parametrize("place", ["file", "list", "override", "second file"])
def test_no_resolver_is_run(tmp_path, monkeypatch, value, place):
    monkeypatch.setenv("MPO_TEST_SECRET", SECRET)
    called = []
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)  # of omegaconf 2.4 and 2.3
    register("mpo_test_own", called.append)
    quoted, second = f"'{value}'", tmp_path / "second.yaml"
    second.write_text(f"model: {{path: {quoted}}}", encoding="utf-8")
    text, overrides, where, key = {
        "file": (f"model: {{path: {quoted}}}", (), tmp_path / "run.yaml", "model.path"),
        "list": (f"data: {{path: [a, {quoted}]}}", (), tmp_path / "run.yaml", "data.path[1]"),
        "override": ("", (f"model.path={quoted}",), "the command line", "model.path"),
        "second file": ("", (str(second),), second, "model.path"),
    }[place]
    try:
        with pytest.raises(UserError) as caught:
            load(tmp_path, text, *overrides)
    finally:
        OmegaConf.clear_resolver("mpo_test_own")
    said = str(caught.value)
    assert f"{where}: {key} calls a resolver" in said and SECRET not in said and not called


def test_other_keys_and_escaped_dollars_are_read(tmp_path):
    config = load(tmp_path, r"""{seed: 3, workdir: 'runs/${seed}', model: {path: '\${oc.env:HOME}'}}""")
    assert (config.workdir, config.model.path) == ("runs/3", "${oc.env:HOME}")


text = st.lists(
    st.one_of(
        st.characters(codec="utf-8", exclude_characters="{}"),
        st.sampled_from(["\\", "${", "${seed}", "${oc.env:HOME}"]),
    ),
    max_size=8,
).map("".join)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "workdir": text.filter(str.strip),
            "seed": st.integers(0, 2**31 - 1),
            "experiment": st.lists(st.sampled_from(["sft", "mpo", "ppo_hard"]), min_size=1, max_size=3, unique=True),
            "text": st.fixed_dictionaries({"prompt_template": st.tuples(text, text).map("{prompt}".join)}),
            "data": st.fixed_dictionaries({"path": st.lists(text, min_size=1, max_size=2), "kind": st.just("pairs")}),
            "select": st.one_of(
                st.fixed_dictionaries({"easy_fraction": st.floats(0, 1)}),
                st.fixed_dictionaries({"threshold": st.floats(0, allow_nan=False, allow_infinity=False)}),
            ),
            "sft": st.fixed_dictionaries(
                {"train": st.fixed_dictionaries({"epochs": st.floats(0, 1e9, exclude_min=True), "steps": st.none()})}
            ),
        },
    )
)
def test_what_is_written_reads_back_equal(tmp_path_factory, values):
    config = Config.model_validate(values)
    written = to_yaml(config)
    assert load(tmp_path_factory.getbasetemp(), written) == config
    assert list(yaml.safe_load(written)) == list(Config.model_fields)


def test_records_of_earlier_versions_are_read_under_the_new_names(tmp_path):
    """What a run left in its folder; a configuration that a user writes is refused."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "ppo: {discount: 0.5, top_p: 1.0, trace: 0.9}\nruntime: {keep_checkpoints: true}\n", encoding="utf-8"
    )
    read = read_record(path)
    assert (read.ppo.gamma, read.ppo.gae_lambda, read.runtime.keep_finished_checkpoints) == (0.5, 0.9, True)
    with pytest.raises(UserError, match=r"ppo\.discount is called ppo\.gamma now"):
        load_config(path)
    assert read_record_of(tmp_path, read) == read


def read_record_of(folder, config):
    (folder / "now.yaml").write_text(to_yaml(config), encoding="utf-8")
    return read_record(folder / "now.yaml")


def test_it_is_known_which_keys_the_command_line_has_set_and_equal_values_are_equal(tmp_path):
    (tmp_path / "a.yaml").write_text("ppo: {train: {steps: 3}}")
    config = load_config(tmp_path / "a.yaml", ("train.steps=2", "seed=1"), stage="dpo")
    assert config.given.command_line == {"dpo", "dpo.train", "dpo.train.steps", "seed"}
    assert config.given.files == ({"ppo", "ppo.train", "ppo.train.steps"},)
    in_python = Config(seed=1, dpo={"train": {"steps": 2}}, ppo={"train": {"steps": 3}})
    assert config == in_python and hash(config) == hash(in_python) and not in_python.given.command_line
    assert config.model_copy(update={"seed": 2}).given.command_line == config.given.command_line
    assert "given" not in to_yaml(config)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=true", "seed is a number, not true"),
        ("dpo.beta=false", "beta is a number, not false"),
        ("evaluate.num_prompts=true", "num_prompts is a number, not true"),
        ('workdir="a\\0b"', "workdir holds the character NUL"),
        ('data.path=["a\\0b"]', "path holds the character NUL"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(tmp_path, override, says):
    with pytest.raises(UserError, match=says):
        load(tmp_path, "seed: 1\ndata: {kind: pairs, path: [a]}\n", override)
