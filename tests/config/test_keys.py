"""mpo_jax.config.keys and readme: what is said of every key, and that configs/README.md says it."""

import json
import re
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from mpo_jax.cli.app import main
from mpo_jax.config import keys, readme
from mpo_jax.config.load import load_config
from mpo_jax.config.old_keys import dotted
from mpo_jax.config.schema import Config, Section
from mpo_jax.data import hh, records, scored, tldr
from mpo_jax.data.rendering import Renderer
from mpo_jax.data.sources import open_source
from mpo_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


OPTIONAL = ("runtime.wandb", "model.adapter")
"""Sections that are null by default, and not where one of their keys is given."""


def is_optional(key: keys.Key) -> bool:
    return key.name.startswith(tuple(f"{section}." for section in OPTIONAL))


def names(section: str | None = None) -> list[str]:
    return [key.name for key in keys.find_keys(section)]


def mpo(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["mpo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_every_key_of_the_schema_is_listed_once():
    config = Config()
    values = config.model_dump()
    sections = {name for name in dotted(values) if isinstance(attrgetter(name)(config), Section)}
    found = names()
    assert len(found) == len(set(found))
    assert set(found) == set(dotted(values)) - sections | {key.name for key in keys.find_keys() if is_optional(key)}
    assert {key.name.rpartition(".")[0] for key in keys.find_keys() if is_optional(key)} == set(OPTIONAL)


def test_every_key_has_a_description():
    """In one form: no capital, no full stop, no Markdown, so that a terminal and a table can both show it."""
    for key in keys.find_keys():
        text = key.description
        assert text, f"{key.name} has no description"
        assert not text.endswith(".") and "`" not in text and "\n" not in text, f"{key.name}: {text}"
        assert text[0] == text[0].lower() or text.split()[0].isupper() or text.startswith(("KL", "XLA", "Brad")), text


def test_every_section_says_what_it_is_for():
    for part in keys.parts():
        assert part.purpose and "__doc__" in vars(part.kind), f"{part.kind.__name__} has no docstring"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("workdir", ("str", '"runs/default"', "")),
        ("seed", ("int", "0", "in [0, 2147483648)")),
        ("ppo.gae_lambda", ("float", "0.95", "in [0, 1]")),
        ("dpo.label_smoothing", ("float", "0.1", "in [0, 0.5)")),
        ("ppo.extras.ema_decay", ("float or null", "null", "in (0, 1)")),
        ("select.top_p", ("float", "1.0", "in (0, 1]")),
        ("ppo.kl.coef", ("float", "0.4", ">= 0")),
        ("sft.train.steps", ("int or null", "null", "> 0")),
        ("dpo.loss", ('"dpo" | "cdpo" | "ipo" | "simpo"', '"dpo"', "")),
        ("dpo.loss_options", ("numbers by name", "{}", "")),
        ("sft.train.best_mode", ('"min" | "max" or null', "null", "")),
        ("data.path", ("list of str", "[]", "")),
        ("table.thresholds", ("list of float", "[1.0, 2.0]", "")),
        ("data.keep_news", ("bool", "false", "")),
        ("runtime.wandb", ("section or null", "null", "")),
        # each stage's own, not its class's
        ("sft.train.optim.learning_rate", ("float", "5e-5", ">= 0")),
        ("reward.train.optim.learning_rate", ("float", "5e-6", ">= 0")),
        ("dpo.train.optim.learning_rate", ("float", "5e-6", ">= 0")),
        ("ppo.train.optim.learning_rate", ("float", "3e-6", ">= 0")),
        ("ppo.critic_optim.learning_rate", ("float", "5e-6", ">= 0")),
        ("sft.train.optim.weight_decay", ("float", "0.0", ">= 0")),
        ("ppo.train.optim.weight_decay", ("float", "0.1", ">= 0")),
    ],
)
def test_type_default_and_range(name, expected):
    key = keys.find_keys(name)[0]
    assert (key.type, key.default, key.constraint) == expected


@pytest.mark.parametrize("key", [k for k in keys.find_keys() if not is_optional(k)], ids=lambda k: k.name)
def test_a_default_given_as_it_is_shown_changes_nothing(key):
    assert load_config(None, (f"{key.name}={key.default}",)) == Config()


def test_a_section_is_listed_with_those_inside_it():
    assert names("ppo.kl") == [f"ppo.kl.{name}" for name in ("coef", "adaptive", "target", "horizon", "stop")]
    ppo = names("ppo")
    assert ppo[0] == "ppo.epochs" and set(names("ppo.kl")) < set(ppo) and all(n.startswith("ppo.") for n in ppo)
    assert names("seed") == ["seed"]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("ppo.klx", "no section or key of the configuration is called ppo.klx; did you mean ppo.kl?"),
        ("pop", "did you mean ppo?"),
        ("gae_lambda", "did you mean ppo.gae_lambda?"),
        ("ppo.discount", "ppo.discount is called ppo.gamma now: write ppo.gamma"),
        ("zzz", "its sections are model, text, data, sft, reward, select, dpo, ppo, evaluate, table, mesh, runtime"),
        ("pp", "did you mean ppo?"),
        ("", "its sections are model, "),
    ],
)
def test_a_section_that_is_none_names_the_nearest(section, says):
    with pytest.raises(UserError) as caught:
        keys.find_keys(section)
    assert says in str(caught.value)


def test_a_line_per_key_and_the_columns_aligned():
    lines = keys.listing("ppo.kl").splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("ppo.kl.adaptive  bool = false          change coef after every iteration")
    assert lines[2].startswith("ppo.kl.target    float = 6.0           > 0  KL to aim for, in nats per response")
    assert len([line for line in keys.listing().splitlines() if line]) == len(keys.find_keys())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_are_wrapped_to_the_terminal_and_lose_no_word(width):
    text = keys.listing(None, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.split() == keys.listing().split()


def test_the_command_lists_keys(monkeypatch, capsys):
    assert mpo(monkeypatch, "config", "--keys", "ppo.kl") == 0
    assert capsys.readouterr().out == keys.listing("ppo.kl")
    assert mpo(monkeypatch, "config", "--keys") == 0
    assert capsys.readouterr().out == keys.listing()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--keys", "ppo.klx"), "did you mean ppo.kl?"),
        (("--keys", "ppo", "seed=1"), "takes one section or key, not 'seed=1'"),
        ((), "mpo config needs CONFIG"),
    ],
)
def test_the_command_s_mistakes_end_with_status_2(monkeypatch, capsys, arguments, says):
    assert mpo(monkeypatch, "config", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error


def test_the_command_still_prints_a_resolved_configuration(monkeypatch, capsys):
    assert mpo(monkeypatch, "config", str(CONFIGS / "quickstart.yaml"), "seed=3") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == load_config(CONFIGS / "quickstart.yaml", ("seed=3",)).model_dump(mode="json")


def test_the_readme_is_current():
    written = (CONFIGS / "README.md").read_text(encoding="utf-8")
    if written != readme.page():
        pytest.fail("configs/README.md is not current: run  python -m mpo_jax.config.readme > configs/README.md")


def test_the_readme_has_every_key_and_its_description():
    page = readme.page().partition("\n## Keys\n")[2]
    for key in keys.find_keys():
        name = key.name.rpartition(".")[2] if re.search(r"\.train\.|critic_optim", key.name) else key.name
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` | ")), None)
        assert row is not None, f"{key.name} has no row"
        assert key.default.replace("|", "\\|") in row and key.description in row
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, f"a bar of {key.name} would split its cell: {row}"
    assert not re.search(r"\{(contents|tables|old_keys|\w+_preferences)\}", readme.page())


def test_the_readme_s_links_lead_to_headings_of_their_own():
    page = readme.page()
    headings = [readme.anchor(line.lstrip("# ")) for line in page.splitlines() if re.match("#+ ", line)]
    assert len(headings) == len(set(headings)), "of two equal headings GitHub renames the second"
    links = re.findall(r"\]\(#([^)]*)\)", page)
    assert len(links) > 15 and set(links) <= set(headings)


def test_the_readme_names_every_file_beside_it():
    listed = re.findall(r"^\| `([\w/]+\.yaml)` \| \S", readme.page(), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(CONFIGS)) for path in FILES)


def test_the_readme_s_yaml_is_read(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", readme.page(), re.DOTALL)
    (tmp_path / "example.yaml").write_text(example, encoding="utf-8")
    config = load_config(tmp_path / "example.yaml")
    assert (config.data.path, config.dpo.train.optim.learning_rate) == (("first.jsonl", "second.jsonl.gz"), 1e-6)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_configuration_file_sets_known_keys_only(path):
    if path.parent.name == "presets":
        # merged over a configuration whose batches its micro-batches divide
        assert yaml.safe_load(path.read_text(encoding="utf-8")) and load_config(
            CONFIGS / "hh_llama2_7b.yaml", (str(path),)
        )
        return
    needs_rows = path.parent.name == "bench"
    assert load_config(path, ("data.path=rows.jsonl",) if needs_rows else ()) != Config()


class Template:
    """Stands for a tokenizer's chat template."""

    def prompt(self, messages) -> str:
        return " ".join(message["content"] for message in messages)

    def response(self, messages, reply: str) -> str:
        return reply

    def left_out(self, messages) -> None:
        return None

    def unwritten(self, messages, shown: str) -> list[str]:
        return []


READERS = {
    "pairs_preferences": records.read_preferences,
    "pairs_demonstrations": records.read_demonstrations,
    "pairs_published": records.read_preferences,
    "pairs_tools": records.read_demonstrations,
    "pairs_prompts": records.read_prompts,
    "hh_preferences": hh.read_hh,
    "tldr_preferences": tldr.read_tldr_preferences,
    "scored_preferences": scored.read_scored,
    "tldr_demonstrations": tldr.read_tldr_demonstrations,
}
PROMPTS = {
    "pairs": records.read_prompts,
    "scored": records.read_prompts,
    "hh": hh.read_hh_prompts,
    "tldr": tldr.read_tldr_prompts,
}


@pytest.mark.parametrize("use", readme.EXAMPLES)
def test_the_readme_s_rows_are_read_as_it_says(tmp_path, use):
    rows = readme.EXAMPLES[use]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for reader in (READERS[use], PROMPTS[use.partition("_")[0]]):
        _, report = reader(open_source(str(path)), render=Renderer(Template))
        assert (report.kept, dict(report.dropped)) == (len(rows), {})
