"""mpo_jax.data.chat: turns to text by the tokenizer's template, and the part of it that a reply adds."""

from typing import Any

import pytest

from mpo_jax.config.schema import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.chat import Chat, Message, SystemRefused, fold_system_turns, read_template
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError

EOS = str(toy.make_tokenizer().eos_token)
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# as Llama 2's: the header is empty and the content stripped, with spaces around it
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
OTHER_END = CHATML.replace("{{ eos_token }}", "<|end|>")
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}"
)
FORGETFUL = (
    "{% if messages[-1].role == 'user' %}{{ messages[-1].content }}>"
    "{% else %}{{ messages[-1].content }}{{ eos_token }}{% endif %}"
)
NO_TURNS = "{{ raise_exception('no turns at all') }}"
TURNS: list[Message] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "should i quit?"},
]


# as Qwen3's: without thoughts, the prompt has an empty block of them that a whole conversation has too
OPTION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# as DeepSeek-R1's distilled models: the prompt opens thoughts, and a whole conversation leaves them out
OPENS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# as SmolLM3's: an empty block of thoughts in the prompt alone
CLOSED = OPENS.replace("<think>\n", "<think>\n\n</think>\n\n")
# as Gemma 2's: a header that looks like a tag, and no system turn; the reply's own space does not count
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
# the number of turns at the start, so that no prompt is the beginning of what follows it
COUNTED = "{{ messages | length }} turns " + NO_SYSTEM.replace("<end_of_turn>", "{{ eos_token }}")


def chat(template, **options) -> Chat:
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, **options)


def test_a_prompt_ends_with_the_header_of_the_assistants_turn():
    assert chat(CHATML).prompt(TURNS) == f"<|system|>be kind{EOS}\n<|user|>should i quit?{EOS}\n<|assistant|>"
    assert chat(SPACED).prompt(TURNS[1:]) == "[INST] should i quit? [/INST]"


@pytest.mark.parametrize(
    ("template", "reply", "expected"),
    [
        (CHATML, "no", "no"),
        (CHATML, " no\n", " no\n"),
        (CHATML, "", ""),
        (CHATML, f"a {EOS} ends it", f"a {EOS} ends it"),
        (SPACED, "no", " no "),
        (SPACED, "  no\n", " no "),
        (SPACED, f"a {EOS} ends it", f" a {EOS} ends it "),
        (SPACED, f" a {EOS} ends it\n", f" a {EOS} ends it "),
        (OTHER_END, "no", "no"),
        (OTHER_END, f"a {EOS} ends it", f"a {EOS} ends it"),
        (NO_END, "no", "no"),
        (THINKING, "no", "<think></think>\nno"),
        (FORGETFUL, "no", "no"),
        (FORGETFUL, "no, wait for a year", "no, wait for a year"),
        (OPTION, "no", "<think>\n\n</think>\n\nno"),
        # the prompt stays, and the reply follows it
        (CLOSED, "no", "no"),
        (COUNTED, "no", "no"),
        (COUNTED, " no\n", "no"),
        (COUNTED.replace("| trim ", ""), " no\n", " no\n"),
        (OPENS, "i think\n</think>\n\nno", "i think\n</think>\n\nno"),
        (OPENS, "<think>\ni think\n</think>\n\nno", "i think\n</think>\n\nno"),
    ],
)
def test_a_response_is_what_the_template_adds_without_its_eos(template, reply, expected):
    assert chat(template).response(TURNS[1:], reply) == expected


@pytest.mark.parametrize("template", [CHATML, SPACED, THINKING])
def test_prompt_response_and_eos_are_the_beginning_of_the_whole_conversation(template):
    templated = chat(template)
    turns: list[Any] = [*TURNS[1:], {"role": "assistant", "content": "no"}, {"role": "user", "content": "why?"}]
    reply = {"role": "assistant", "content": "money"}
    whole = str(templated.tokenizer.apply_chat_template([*turns, reply], tokenize=False))
    assert whole.startswith(templated.prompt(turns) + templated.response(turns, "money") + EOS)


@pytest.mark.parametrize("opening", ["<think>", "[THINK]", "\u25c1think\u25b7"])
def test_no_bare_reply_after_an_open_tag(opening):
    closing = opening[0] + "/" + opening[1:]
    templated = chat(OPENS.replace("<think>", opening).replace("</think>", closing))
    assert templated.prompt(TURNS[1:]).endswith(f"<|assistant|>{opening}\n")
    with pytest.raises(UserError) as caught:
        templated.response(TURNS[1:], "no")
    message = str(caught.value)
    assert f"ends inside {opening}" in message and closing in message and "text.template_options" in message


def test_a_template_that_leaves_out_the_reply_is_refused():
    with pytest.raises(UserError, match=r"leaves out the reply .* text\.chat_template"):
        chat("{% if add_generation_prompt %}a{% else %}b{% endif %}").response(TURNS, "no")


def test_the_templates_own_options():
    turns = TURNS[1:]
    assert chat(OPTION).prompt(turns).endswith("<|assistant|>")
    quiet = chat(OPTION, options={"enable_thinking": False})
    assert quiet.prompt(turns).endswith("<|assistant|><think>\n\n</think>\n\n")
    assert quiet.response(turns, "no") == "no"
    assert quiet.prompt(turns) == Chat.of(
        quiet.tokenizer, TextConfig(template_options={"enable_thinking": False})
    ).prompt(turns)
    with pytest.raises(UserError, match=r"text\.template_options\.enable_thinkin: .* does not mention enable_thinkin"):
        chat(OPTION, options={"enable_thinkin": False})


@pytest.mark.parametrize("name", ["eos_token", "chat_template", "tokenize", "a b", "add_generation_prompt"])
def test_what_the_templates_are_given_anyway_is_no_option(name):
    with pytest.raises(ValueError, match=f"{name} is no option of a chat template"):
        TextConfig(template_options={name: "a"})


# system turns


def test_a_refused_system_turn_is_folded_into_the_users():
    folding, reply = chat(NO_SYSTEM, fold_system=True), "<start_of_turn>assistant\n"
    assert folding.prompt(TURNS) == f"<start_of_turn>user\nbe kind\n\nshould i quit?<end_of_turn>\n{reply}"
    assert folding.response(TURNS, "no") == chat(NO_SYSTEM).response(TURNS[1:], "no") == "no"
    with pytest.raises(SystemRefused, match=r"refuses a system turn: text\.fold_system=true"):
        chat(NO_SYSTEM).prompt(TURNS)
    with pytest.raises(SystemRefused):
        chat(NO_SYSTEM).response(TURNS, "no")


def test_a_system_turn_that_is_taken_stays():
    assert chat(CHATML, fold_system=True).prompt(TURNS) == chat(CHATML).prompt(TURNS)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("su", [("user", "0\n\n1")]),
        ("ssu", [("user", "0\n\n1\n\n2")]),
        ("s", [("user", "0")]),
        ("sau", [("user", "0"), ("assistant", "1"), ("user", "2")]),
        ("usau", [("user", "0"), ("user", "1"), ("assistant", "2"), ("user", "3")]),
        ("uasu", [("user", "0"), ("assistant", "1"), ("user", "2\n\n3")]),
    ],
)
def test_where_folded_turns_go(roles, expected):
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns: Any = [{"role": names[role], "content": str(i)} for i, role in enumerate(roles)]
    assert [(turn["role"], turn["content"]) for turn in fold_system_turns(turns)] == expected


def test_an_empty_system_turn_folds_to_nothing():
    turns: Any = [{"role": "system", "content": " "}, *TURNS[1:]]
    assert fold_system_turns(turns) == TURNS[1:]


# templates from files


def test_a_templates_file_is_read(tmp_path):
    (tmp_path / "a.jinja").write_text(CHATML, encoding="utf-8")
    assert read_template(str(tmp_path / "a.jinja")) == CHATML


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "the file is empty"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"a" * 1_000_001, "more than 1000000 bytes"),
    ],
)
def test_a_file_that_is_no_template_is_refused(content, reason, tmp_path):
    path = tmp_path / "a.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"text.chat_template={path}: .*{reason}"):
        read_template(str(path))


def test_a_broken_template_is_named_with_its_line():
    text = TextConfig(chat_template="mine.jinja")
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "a\n{% if %}"
    with pytest.raises(UserError, match=r"the chat template mine\.jinja fails on turns of user: line 2: "):
        Chat.of(tokenizer, text).prompt(TURNS[1:])


@pytest.mark.parametrize(
    "body",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_runs_in_a_sandbox(body):
    with pytest.raises(UserError, match="fails on turns of user: "):
        print(chat(body).prompt(TURNS[1:]))


def test_the_response_ends_with_one_eos():
    templated = chat(CHATML)
    codec = TextCodec(templated.tokenizer, TextConfig())
    ids = codec.response(templated.response(TURNS, " my boss")).ids
    assert ids == [*codec.tokenizer(" my boss").input_ids, codec.eos_id]


def test_a_template_that_writes_the_day_writes_the_same_every_day():
    assert chat("{{ strftime_now('%d %b %Y, %A %Y-%m-%d') }}|").prompt(TURNS) == "26 Jul 2024, Friday 2024-07-26|"
    guarded = "{% if strftime_now is defined %}{% set day = strftime_now('%B') %}{% endif %}\n{{ day }}"
    assert chat(guarded).prompt(TURNS) == "July"


@pytest.mark.parametrize("template", [None, "", {"tool_use": CHATML, "rag": CHATML}])
def test_a_tokenizer_without_a_template_is_refused(template):
    with pytest.raises(UserError, match=r"no chat template .* text\.chat=true"):
        chat(template)


def test_the_default_of_several_templates_is_taken():
    assert chat({"tool_use": NO_END, "default": SPACED}).prompt(TURNS[1:]) == "[INST] should i quit? [/INST]"


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (NO_TURNS, TURNS, "fails on turns of system, user: no turns at all"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", TURNS[1:], "fails on turns of user: "),
        ("{% for", TURNS[1:], "fails on turns of user: "),
        (CHATML, [], "fails on turns of : .*empty conversation"),
    ],
)
def test_a_template_that_fails_says_on_what(template, turns, reason):
    with pytest.raises(UserError, match=f"the tokenizer's chat template {reason}"):
        chat(template).prompt(turns)
