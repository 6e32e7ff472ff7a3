"""mpo_jax.data.template: each construct of widespread chat templates renders as transformers renders it."""

from collections.abc import Callable
from typing import Any

import pytest

from mpo_jax.data.chat import Chat
from mpo_jax.data.template import MAX_WORK, _state, render
from mpo_jax.errors import UserError
from tests.data.test_layouts import SCHEMA
from tests.data.test_records import reply, user
from tests.data.test_turns import byte_tokenizer

FUNCTION = {
    "name": "add",
    "description": "Adds <b>\"numbers\"</b> & 'é'",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": ["integer", "null"], "enum": [1, None, 2.5, True]}},
        "required": ["a"],
    },
}
TOOLS: list[Any] = [SCHEMA, {"type": "function", "function": FUNCTION}]
CALLS = [
    {"type": "function", "id": "call_0001", "function": {"name": "add", "arguments": {"b": None, "a": "<Zürich>"}}},
    {"type": "function", "id": "call_0002", "function": {"name": "weather", "arguments": {}}},
]
TALK: list[Any] = [
    {"role": "system", "content": " Be <brief>. "},
    user("sum?\n"),
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": '{"sum": "é"}', "tool_call_id": "call_0001", "name": "add"},
    {"role": "tool", "content": "fine", "tool_call_id": "call_0002"},
    reply("<think>\nhm\n</think>\n\n3 "),
    user("thanks"),
]
TEMPLATES = {
    "large numbers in a text": (
        "{{ '{}'.format(123456789) }}{{ '12345678901 %s %d%%' % ('a', 1234567890) }}"
        "{{ '{:>5.1f}|{:,}'.format(2, 1234567) }}"
    ),
    "slices and joins": (
        "{{ messages[0].content[::-1] }}{{ messages[1:]|length }}{{ messages|map(attribute='role')|join(', ') }}"
    ),
    "JSON": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{"
    "{ tools[1] | tojson(ensure_ascii=True, sort_keys=true) }}"
    "{{ tools | tojson(separators=(',', ':')) }}{{ {'output': messages[3].content} | tojson }}",
    "a system turn taken out": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}[{{ system }}]{{ messages | length }}"
    "{{ messages[::-1][0].content }}{{ messages[-1].role }}",
    "namespace": "{%- set ns = namespace(found=false, last=messages | length - 1) -%}\n{%- for m in messages[::-1] %}"
    "{%- set at = (messages | length - 1) - loop.index0 %}{% if m.role == 'user' and not ns.found %}"
    "{% set ns.found = true %}{% set ns.last = at %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.last }}",
    "an empty namespace": "{% set ns = namespace() %}{% set ns.index = 0 %}{% for m in messages %}"
    "{% if not (m.role == 'tool' or (m.tool_calls is defined and m.tool_calls is not none)) %}"
    "{{ (m['role'] == 'user') != (ns.index % 2 == 0) }}{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}",
    "selected messages": "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages "
    "| rejectattr('role', 'eq', 'tool') | selectattr('tool_calls', 'undefined') %}{{ loop.index0 }}{{ m.content }}"
    "{{ m == users[-1] }}{{ m != users[0] }}{{ m in users }}{% endfor %}{"
    "{ messages | map(attribute='role') | join('|') }}",
    "a list that grows": "{% set n = namespace(kept=[]) %}{% for m in messages %}{% if m.role not in ['tool'] and "
    "not m.get('tool_calls') %}{% set n.kept = n.kept + [m] %}{% endif %}{% endfor %}{{ n.kept | length }}",
    "items": "{% for tool in tools %}{% for key, value in tool.function.items() if key != 'name' %}{{ key }}"
    "{% if value is string %}{{ '=' + value }}{% elif value is mapping %}{{ value | tojson }}{% endif %}"
    "{{ ', ' if not loop.last }}{% endfor %}{% for name, field in tool.function.parameters | items %}{{ name }}"
    "{% if loop.first %}!{% endif %}{% endfor %}"
    "{% for k, v in tool.function | dictsort %}{{ k }}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro kind(spec) %}{% set names = {'number': 'float'} %}"
    "{% if spec.type is string %}"
    "{% if names[spec.type] is defined %}{{ names[spec.type] }}{% else %}{{ spec.type }}{% endif %}"
    "{% elif spec.type is iterable %}{% for t in spec.type %}{{ kind({'type': t}) }}"
    "{% if not loop.last %}|{% endif %}"
    "{% endfor %}{% else %}Any{% endif %}{% endmacro %}"
    "{% for p, spec in tools[1].function.parameters.properties | items %}{{ p ~ ': ' ~ kind(spec) }}{% endfor %}",
    "calls": "{% for m in messages if m.tool_calls %}{% for call in m.tool_calls %}{% if call.function is defined %}"
    "{% set call = call.function %}{% endif %}{% set out = call | tojson %}{{ out[:-1] }}|{{ call.name | trim }}|"
    "{{ call.arguments is mapping }}{{ call.arguments | tojson }}{% endfor %}{"
    "{ m.tool_calls[0].id[-4:] }}{% endfor %}",
    "results": "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role "
    "!= 'tool' %}<{% endif %}{{ m.content | string }}{% if m.content.content is defined %}no{% endif %}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}>{% endif %}{"
    "{ loop.previtem.role if loop.previtem }}{% endif %}"
    "{% endfor %}",
    "thoughts": "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if '</think>' in content %}{"
    "{ content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}|"
    "{{ content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{"
    "{ m.role.startswith('us') and m.content.endswith('s') }}"
    "{% endfor %}",
    "string methods": "{% for m in messages %}{{ m.role.upper() }}{{ m.content.strip() }}{"
    "{ m.content.replace('<', '&lt;') "
    "}}{{ m.content | replace('s', '') | capitalize }}{{ m.role.title() }}{{ '%s: %d' | format(m.role, loop.index) }}"
    "{{ '{}-{}'.format(m.role, loop.index0) }}{{ '%05.1f' % 2.25 }}{{ m.content.find('a') }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% if m.role == 'tool' %}"
    "{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%} {"
    "{ m.content }}{{ eos_token }}"
    "\n{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "whitespace": "{{- bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n        "
    "{{ m.content }}\n"
    "    {%- else -%}\n  {{- m.role -}}\n   {% endif %}\n{%- endfor %}\n\n"
    "{# a remark #}\n{% if add_generation_prompt %}\n"
    "  {{ 'assistant:' }}\n{% endif %}",
    "what is missing": "{{ tools is defined }}{{ documents is none }}{{ nothing is defined }}{{ nothing }}"
    "{{ nothing | default('d') }}{{ messages[0].nothing }}{"
    "{ messages[0].nothing is undefined }}{{ (nothing or 'x') }}"
    "{{ messages[0]['tool_calls'] is defined }}{{ 'tool_calls' in messages[2] }}{{ none is none }}",
    "an exception": "{{ raise_exception('Roles must alternate') }}",
    "a system turn refused": "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}ok",
    "kinds of values": "{% for x in [1, 1.5, 'a', none, true, [1], {'a': 1}] %}{{ x is number }}{{ x is string }}"
    "{{ x is sequence }}{{ x is mapping }}{{ x is boolean }}{{ x is none }}{{ x is iterable }}{{ x }}{% endfor %}",
    "blocks": "{% set text %}{% for m in messages %}{{ m.role }},{% endfor %}{% endset %}{"
    "{ text | trim(',') | length }}"
    "{% macro wrapped() %}{{ caller('in') }}{% endmacro %}{% call(x) wrapped() %}{{ x }}{% endcall %}",
    "numbers and lists": "{{ range(3) | list }}{{ [3, 1, 2] | sort }}{{ [1, 2] + [3] }}{{ (1, 2) + (3,) }}{"
    "{ 7 // 2 }}"
    "{{ 7 % 4 }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [1, 1] | unique | list }}{"
    "{ 2 in [1, 2] }}{{ 'x' if 1 > 2 }}"
    "{{ dict(a=1) }}{{ [[1, 2]] == [[1, 2]] }}{{ [3, 2] < [3, 4] }}{{ [1, 2] | sum }}{{ [4] is eq([4]) }}",
}


def ours(template: str, messages: list[Any], **given: Any) -> str:
    return render(template, messages, special_tokens=byte_tokenizer(template).special_tokens_map, options={}, **given)


def outcome(call: Callable[..., Any], *args: Any, **given: Any) -> str:
    try:
        return f"text: {call(*args, **given)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_renders_as_in_transformers(template):
    tokenizer, outcomes = byte_tokenizer(template), set()
    for messages in (TALK, TALK[1:], TALK[1:3], TALK[1:2]):
        for tools in (TOOLS, None):
            for generation in (False, True):
                given: dict[str, Any] = {"tools": tools, "add_generation_prompt": generation}
                found = outcome(ours, template, messages, **given)
                assert found == outcome(tokenizer.apply_chat_template, messages, tokenize=False, **given)
                outcomes.add(found.partition(":")[0])
    assert outcomes == {"TemplateError"} if template == TEMPLATES["an exception"] else "text" in outcomes


# a template like Qwen3's and one like Mistral's: both ask for the whole conversation at every turn
AT_EVERY_TURN = {
    "its length": "{% for m in messages[::-1] %}{{ messages | length - loop.index0 }}{"
    "{ (messages | first).role }}{% endfor %}",
    "a list that grows": TEMPLATES["a list that grows"],
    "its last turn": "{% set own = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{{ m == own[-1] }}{{ 'tool_calls' in m }}{% endfor %}",
}


@pytest.mark.parametrize("template", AT_EVERY_TURN.values(), ids=AT_EVERY_TURN)
def test_the_work_of_a_long_conversation_grows_with_its_turns(template):
    """An agent's 1000 turns of 1000 characters are within the limit, however often a"
    " template looks at all of them."""
    messages = [turn for n in range(500) for turn in (user(f"{n} " * 250), reply("yes " * 250))]
    tokenizer = byte_tokenizer(template)
    given: dict[str, Any] = {"add_generation_prompt": True, "tools": None}
    assert ours(template, messages, **given) == tokenizer.apply_chat_template(messages, tokenize=False, **given)
    assert _state.work < MAX_WORK / 4


def test_conversations_with_tools_have_a_template_of_their_own():
    """As Command R's and Hermes'; transformers chooses by the tools in the same way."""
    tokenizer = byte_tokenizer("")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | tojson }}{{ flag }}"}
    chat = Chat(tokenizer, options={"flag": True})
    for turn in (user("a"), {**user("a"), "tools": TOOLS}):
        tools = turn.get("tools")
        assert chat.prompt([turn]) == tokenizer.apply_chat_template([user("a")], tools=tools, flag=True, tokenize=False)
    tokenizer.chat_template = {"tool_use": "a"}
    with pytest.raises(UserError, match="has no chat template"):
        Chat(tokenizer)
