"""mpo_jax.config.old_keys: a renamed key is refused with its new name, a removed one with the reason."""

import pytest
import yaml

from mpo_jax.cli.app import main
from mpo_jax.config.load import load_config
from mpo_jax.config.old_keys import REMOVED, RENAMED, dotted
from mpo_jax.config.schema import Config
from mpo_jax.errors import UserError

RENAMES = [
    ("ppo.discount", "ppo.gamma"),
    ("ppo.trace", "ppo.gae_lambda"),
    ("ppo.policy_clip", "ppo.clip_eps"),
    ("ppo.value_clip", "ppo.value_clip_eps"),
]
WHY = "a truncated sampler draws from another distribution than the one whose log-probabilities PPO uses"


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[return-value]


def refusal(path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_tables_speak_of_keys_that_were_and_are():
    known = set(dotted(Config().model_dump()))
    assert set(RENAMES) <= set(RENAMED.items())
    assert set(RENAMED.values()) <= known
    assert not known & {*RENAMED, *REMOVED}


@pytest.mark.parametrize(("old", "new"), RENAMES)
@pytest.mark.parametrize("place", ["file", "second file", "override", "nested override"])
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path, old, new, place):
    value = nested(old, 0.5)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump(value if place == "file" else {}), encoding="utf-8")
    second.write_text(yaml.safe_dump(value), encoding="utf-8")
    overrides, where = {
        "file": ([], first),
        "second file": ([str(second)], second),
        "override": ([f"{old}=0.5"], "the command line"),
        "nested override": ([f"ppo={{{old.removeprefix('ppo.')}: 0.5}}"], "the command line"),
    }[place]
    assert refusal(first, *overrides) == f"{where}: {old} is called {new} now: write {new}"


@pytest.mark.parametrize("key", ["ppo.top_p", "ppo.top_k"])
@pytest.mark.parametrize("value", ["1", "0.9"])
def test_a_removed_key_is_refused_with_the_reason_whatever_its_value(tmp_path, key, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(nested(key, float(value))), encoding="utf-8")
    for said, where in ((refusal(path), path), (refusal(None, f"{key}={value}"), "the command line")):
        assert said.startswith(f"{where}: there is no key {key} any more: remove it. ")
        assert WHY in said and "KL even negative" in said


def test_all_old_keys_of_a_file_are_named_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("ppo: {trace: 0.9, top_p: 1.0, gamma: 1.0, discount: 1.0}", encoding="utf-8")
    said = refusal(path).splitlines()
    assert len(said) == 3 and all(line.startswith(f"{path}: ") for line in said)
    for line, key in zip(said, ("ppo.trace is called", "no key ppo.top_p", "ppo.discount is called"), strict=True):
        assert key in line


def test_keys_that_only_resemble_an_old_one_are_unknown_keys(tmp_path):
    assert refusal(None, "ppo.value_clips=1").startswith("unknown key ppo.value_clips on the command line")
    assert load_config(None, ("ppo.value_clip_eps=0.3",)).ppo.value_clip_eps == 0.3


@pytest.mark.parametrize(
    ("old", "said"), [("ppo.discount=1", "ppo.discount is called ppo.gamma now"), ("ppo.top_k=0", "remove it")]
)
def test_the_command_ends_with_status_2(monkeypatch, capsys, tmp_path, old, said):
    (tmp_path / "run.yaml").write_text("", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["mpo", "config", str(tmp_path / "run.yaml"), old])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the command line: ") and said in error
