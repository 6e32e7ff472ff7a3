"""mpo_jax.data.chat: turns to text by the tokenizer's template, and the part of it that a reply adds."""

from typing import Any

import pytest

from mpo_jax.config.schema import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.chat import Chat, Message
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
USER_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
TURNS: list[Message] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "should i quit?"},
]


def chat(template) -> Chat:
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer)


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
        (USER_ONLY, TURNS, "fails on turns of system, user: no system turns"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", TURNS[1:], "fails on turns of user: "),
        ("{% for", TURNS[1:], "fails on turns of user: "),
        (CHATML, [], "fails on turns of : .*empty conversation"),
    ],
)
def test_a_template_that_fails_says_on_what(template, turns, reason):
    with pytest.raises(UserError, match=f"the tokenizer's chat template {reason}"):
        chat(template).prompt(turns)
