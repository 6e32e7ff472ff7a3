"""A row's fields as text or turns: strings, lists of messages in the forms in which they are published, tools."""

from collections.abc import Mapping
from typing import Any

from mpo_jax.data.chat import Message
from mpo_jax.data.text_files import Row, columns_of
from mpo_jax.errors import UserError
from mpo_jax.untrusted import loads, unrepeated

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""Roles by the names that ShareGPT's `from` has."""
ROLES = {**{name: role for name, role in SPEAKERS.items() if name != "function_call"}, "function": "tool"}
"""Roles by the names that `role` has, in any case; others are left as they are, for templates that know them."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a message's parts that hold text."""


NO_ASSISTANT = "no assistant turn"
UNWRITTEN = "left out by the chat template"
"""Parts of reasons that say what to do where a whole set is dropped for them."""


class Drop(Exception):
    """Raised to drop the current row; the message is the reason."""


class Unusable(UserError):
    """A field that holds no text to learn from. Where rows are read the row is dropped, and counted by `reason`."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class MissingField(UserError):
    """A row lacks a field that its layout needs."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


def text_field(row: Mapping[str, Any], field: str, place: str) -> str:
    """A field that holds a string.

    Raises:
      Unusable: if it is null.
      UserError: if the field is missing, has another type or is not valid Unicode.
    """
    if field not in row:
        raise _missing(dict(row), field, place)
    if row[field] is None:
        raise Unusable(f"{place}: field {field!r} is null", f"{field} is null")
    if not isinstance(row[field], str):
        raise UserError(f"{place}: field {field!r} must be a string, not {type(row[field]).__name__}")
    return whole(row[field], f"{place}: field {field!r}")


def _missing(row: Row, field: str, place: str) -> MissingField:
    inside = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    advice = (
        f": if {inside[0]!r} holds the rows, write that list alone" if [*row] == inside and len(inside) == 1 else ""
    )
    return MissingField(f"{place}: the row has no field {field!r}; it has: {columns_of(row)}{advice}", field)


def whole(text: str, where: str) -> str:
    """The text.

    Raises:
      UserError: if it is no valid Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a surrogate pair, which is not a character") from error
    return text


def said(row: Row, field: str, place: str) -> str | list[Message]:
    """A field that holds a string, a conversation or one message.

    A message is {role, content} or {from, value}; its content is a string, or a list of parts {type: text, text},
    which are joined as they are. Of other keys, tool calls and what says which call a tool's result is of are kept.

    Raises:
      Unusable: for content that is null or no text.
      UserError: if the field is missing or has another type.
    """
    value = row.get(field)
    if not isinstance(value, list | dict):
        return text_field(row, field, place)
    numbered = enumerate(value if isinstance(value, list) else [value], 1)
    return [_message(message, f"{place}: field {field!r}, message {number}") for number, message in numbered]


def tools_of(row: Row, place: str) -> list[Any]:
    """The functions that the row says the assistant may call, as JSON schemas; empty without a field `tools`.

    Raises:
      UserError: if the field is no list, and no list written as JSON.
    """
    tools = _parsed(row.get("tools"), f"{place}: field 'tools'")
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: field 'tools' must be a list of JSON schemas, not {type(tools).__name__}")
    # a table gives every schema the keys of all of them
    return [_without_nulls(tool) for tool in tools]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: a message is an object {{role, content}}, not {type(message).__name__}")
    if message.get("role") is None and message.get("from") is not None:
        return _shared_message(message, where)
    role = text_field(message, "role", where)
    made = Message(role=ROLES.get(role.strip().lower(), role), content="")
    call = message.get("function_call")
    if calls := _calls(message.get("tool_calls") or ([call] if call else None), where):
        made["tool_calls"] = calls
    if not calls or message.get("content") is not None:
        made["content"] = _content(message, "content", where)
    for key in ("name", "tool_call_id"):
        if made["role"] == "tool" and isinstance(message.get(key), str):
            made[key] = message[key]
    return made


def _shared_message(message: dict[str, Any], where: str) -> Message:
    """A message of ShareGPT, {from, value}."""
    speaker = text_field(message, "from", where)
    if speaker.lower() not in SPEAKERS:
        raise UserError(f"{where}: field 'from' must be one of {', '.join(SPEAKERS)}, not {speaker!r}")
    if speaker.lower() != "function_call":
        return Message(role=SPEAKERS[speaker.lower()], content=_content(message, "value", where))
    called = message.get("value")
    calls = called if isinstance(called, list) else [called]
    return Message(role="assistant", content="", tool_calls=_calls(calls, where))


def _content(message: dict[str, Any], field: str, where: str) -> str:
    parts = message.get(field)
    if not isinstance(parts, list):
        return text_field(message, field, where)
    return "".join(_part(part, f"{where}, part {number} of {field!r}") for number, part in enumerate(parts, 1))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return whole(part, where)
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise UserError(f"{where}: a part is an object {{type, text}}, not {type(part).__name__}")
    if part["type"] not in TEXT_PARTS:
        kind = part["type"]
        raise Unusable(f"{where}: only parts of type text can be read, not {kind!r}", f"message part of type {kind}")
    return text_field(part, "text", where)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates read them: {type: function, function: {name, arguments}}, the arguments parsed."""
    calls = _parsed(calls, f"{where}: field 'tool_calls'")
    if not calls:
        return []
    if not isinstance(calls, list):
        raise UserError(f"{where}: field 'tool_calls' must be a list, not {type(calls).__name__}")
    made = []
    for call in calls:
        call = _parsed(call, f"{where}: a tool call")
        called = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(called, dict) or not isinstance(called.get("name"), str):
            raise UserError(f"{where}: a tool call is an object {{function: {{name, arguments}}}}")
        arguments = _parsed(called.get("arguments"), f"{where}: the arguments of {called['name']}")
        made.append({"type": "function", "function": {"name": called["name"], "arguments": arguments or {}}})
        if isinstance(call.get("id"), str):
            made[-1]["id"] = call["id"]
    return made


def _parsed(value: Any, where: str) -> Any:
    """What a string holds as JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return loads(value, pairs=unrepeated)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
