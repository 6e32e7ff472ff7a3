"""Commands ask a model as its training did: template, chat and lengths come from its own folder; options still win."""

import json

import pytest

from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import Config, DataConfig, TextConfig
from tests.cli.conftest import write_model
from tests.cli.test_generate import NO_CACHE, PROMPT, greedy_answer
from tests.pipeline.test_pipeline import mpo
from tests.tools.judge.server import Act, scores, serving

TEMPLATE = "my boss: {prompt} should i quit"
PLAIN = ("my boss", "x")


def stage(workdir, decoder, name, *, head="lm", chat=False, kind="toy", **text):
    """A finished stage's folder, as a run leaves it."""
    folder = workdir / "stages" / name
    folder.mkdir(parents=True)
    write_model(folder / "model", decoder, head=head, chat=chat, seed=int(head == "value"))
    config = Config(
        text=TextConfig(**{"max_prompt_tokens": 40, "max_response_tokens": 5, **text}),
        data=DataConfig(kind=kind, path=() if kind == "toy" else ("rows.jsonl",)),
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    manifest = {"stage": name.partition("-")[0], "parents": {}, "settings": {}, "summary": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def policy(tmp_path, decoder):
    return stage(tmp_path, decoder, "dpo-a", prompt_template=TEMPLATE)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_uses_the_template_and_lengths_unless_told_otherwise(policy, tmp_path, capsys):
    def said(folder, *flags):
        capsys.readouterr()
        assert mpo("generate", str(folder), PROMPT, NO_CACHE, *flags) == 0
        return capsys.readouterr().out

    model, asked = policy / "model", TEMPLATE.replace("{prompt}", PROMPT)
    expected = greedy_answer(model, asked, 5) + "\n"
    plain = greedy_answer(model, PROMPT, 5) + "\n"
    assert expected != plain
    assert said(policy) == said(model) == expected
    assert said(policy, "--raw") == plain == said(policy, "text.prompt_template='{prompt}'")
    assert said(policy, "--max-new-tokens", "3") == greedy_answer(model, asked, 3) + "\n"
    for source, target in ((policy, "once"), (tmp_path / "once", "twice")):
        assert mpo("export", str(source), str(tmp_path / target), NO_CACHE) == 0
    assert said(tmp_path / "twice") == expected


def test_generate_talks_in_turns_where_training_did(tmp_path, decoder, capsys):
    plain = stage(tmp_path, decoder, "dpo-plain", chat=True)
    talks = stage(tmp_path / "other", decoder, "dpo-chat", chat=True, kind="hh")
    config = (talks / "config.yaml").read_text()
    (talks / "config.yaml").write_text(config.replace("chat: false", "chat: true"))
    asked = "user: should i quit<eos>TL;DR:"
    for folder, flags, text in (
        (plain, (), "should i quit"),
        (plain, ("text.chat=true",), asked),
        (talks, (), asked),
        (talks, ("text.chat=false",), "should i quit"),
        (talks, ("--raw",), "should i quit"),
    ):
        assert mpo("generate", str(folder), "should i quit", NO_CACHE, *flags) == 0
        assert capsys.readouterr().out == greedy_answer(folder / "model", text, 5) + "\n", (folder, flags)
    # as HH's reader sees it, this is a conversation
    assert mpo("generate", str(talks), "\n\nHuman: should i quit\n\nAssistant:", NO_CACHE) == 0
    assert capsys.readouterr().out == greedy_answer(talks / "model", asked, 5) + "\n"
    assert mpo("generate", str(plain), "x", "--system", "s", NO_CACHE) == 2
    assert "was trained without (text.chat=false)" in capsys.readouterr().err


def test_generate_takes_a_template_from_a_file_and_its_options(tmp_path, decoder, capsys):
    talks = stage(tmp_path, decoder, "dpo-chat", chat=True, template_options={"mood": "kind"})
    (talks / "model" / "chat_template.jinja").write_text("{{ mood }} {{ messages[-1].content }}|")
    other = tmp_path / "other.jinja"
    other.write_text("{{ mood }}: {% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
                     "{{ messages[0].content }}")  # fmt: skip
    path = f"text.chat_template={other}"
    for flags, text in (
        (("text.chat=true",), "kind should i quit|"),
        (("text.chat=true", "text.template_options.mood=rude"), "rude should i quit|"),
        (("text.chat=true", path), "kind: should i quit"),
        (("text.chat=true", path, "--system", "s", "text.fold_system=true"), "kind: s\n\nshould i quit"),
    ):
        assert mpo("generate", str(talks), "should i quit", NO_CACHE, *flags) == 0
        assert capsys.readouterr().out == greedy_answer(talks / "model", text, 5) + "\n", flags
    for flags, reason in (
        (("--system", "s", path), "refuses a system turn: text.fold_system=true"),
        ((path + "x",), "cannot read the file: No such file"),
        (("text.template_options.moody=1",), "does not mention moody"),
    ):
        assert mpo("generate", str(talks), "should i quit", NO_CACHE, "text.chat=true", *flags) == 2
        assert reason in " ".join(capsys.readouterr().err.split())


def test_score_uses_the_template_once(tmp_path, decoder):
    trained = stage(tmp_path, decoder, "reward-a", head="value", prompt_template=TEMPLATE)
    rows = [{"prompt": prompt, "response": " leave"} for prompt in ("my boss", "x", "should i stay")]
    shown = [{**row, "shown": TEMPLATE.replace("{prompt}", row["prompt"])} for row in rows]
    spelled = [{**row, "prompt": row["shown"]} for row in shown]
    free = ("text.prompt_template='{prompt}'",)
    found = []
    for name, data, flags in (("a", rows, ()), ("b", shown, ()), ("c", spelled, free), ("d", rows, free)):
        given = write(tmp_path / f"{name}-rows.jsonl", data)
        assert mpo("score", str(trained), given, "--out", str(tmp_path / name), *flags, NO_CACHE) == 0
        found.append(lines(tmp_path / name))
    assert found[0] == found[1] == found[2] != found[3]


@pytest.fixture
def runs(tmp_path):
    """Two runs' evaluations: the first under a template, the second under it or under none."""

    def make(second):
        folders = []
        for name, template in (("a", TEMPLATE), ("b", second)):
            folder = tmp_path / "runs" / name
            (folder / "evaluate").mkdir(parents=True)
            (folder / "env.json").write_text("{}")
            rows = [{"prompt": prompt, "response": f"{name} {prompt}"} for prompt in PLAIN]
            for row in rows if template else []:
                row["shown"] = template.replace("{prompt}", row["prompt"])
            write(folder / "evaluate" / "samples.jsonl", rows)
            folders.append(str(folder))
        return folders

    return make


@pytest.mark.parametrize("alike", [True, False])
def test_judges_and_people_see_the_prompt_as_the_policies_did(runs, tmp_path, decoder, capsys, alike):
    sides = runs(TEMPLATE if alike else None)
    seen = [TEMPLATE.replace("{prompt}", p) if alike else p for p in PLAIN]
    path = tmp_path / "prompt.txt"
    path.write_text("<{instruction}> {response_1} {response_2}")
    judged = ("judge", *sides, "--prompt-file", path, "--cache", tmp_path / "cache", "--no-swap")
    with serving(lambda prompt, before: Act(scores(9, 6))) as server:
        assert mpo(*judged, "--out", tmp_path / "j", "--endpoint", server.url, "--model", "m") == 0
        asked = sorted(body["messages"][0]["content"].split(">")[0][1:] for body in server.bodies)
    assert asked == sorted(seen)
    assert ("were asked under different templates" in " ".join(capsys.readouterr().out.split())) != alike
    assert [(row["prompt"], row["alike"]) for row in lines(tmp_path / "j" / "judgements.jsonl")] == [
        ("my boss", alike), ("x", alike)
    ]  # fmt: skip
    assert mpo("human", "export", *sides, "--out", tmp_path / "h") == 0
    items = json.loads((tmp_path / "h" / "key.json").read_text())["items"]
    assert sorted(item["prompt"] for item in items) == sorted(seen)
    if alike:  # a reward model reads what the policies read, not its own template around it
        reward = stage(tmp_path, decoder, "reward-a", head="value", prompt_template="should {prompt}")
        assert mpo(*judged, "--out", tmp_path / "r", "--model", reward, NO_CACHE) == 0
        pairs = [{"prompt": TEMPLATE.replace("{prompt}", p), "chosen": f"a {p}", "rejected": f"b {p}"} for p in PLAIN]
        free = ("text.prompt_template='{prompt}'", NO_CACHE, "--batch-size", "64")
        assert mpo("score", reward, write(tmp_path / "p.jsonl", pairs), "--out", tmp_path / "s", *free) == 0
        expected = [(row["score_chosen"], row["score_rejected"]) for row in lines(tmp_path / "s")]
        assert [(r["total_a"], r["total_b"]) for r in lines(tmp_path / "r" / "judgements.jsonl")] == expected


def test_a_model_that_is_a_side_answers_under_its_template(policy, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"prompt": "my boss"}])
    other = write(tmp_path / "other.jsonl", [{"prompt": "my boss", "response": "x"}])
    flags = ("--data", data, "--out", tmp_path / "h", "evaluate.greedy=true", NO_CACHE, "runtime.token_cache=null")
    assert mpo("human", "export", policy, other, *flags) == 0
    asked = TEMPLATE.replace("{prompt}", "my boss")
    row = lines(tmp_path / "h" / "answers-a.jsonl")[0]
    assert row == {
        "prompt": "my boss", "response": greedy_answer(policy / "model", asked, 5), "category": None, "shown": asked
    }  # fmt: skip
