"""Chat templates from elsewhere, run in Jinja's sandbox within limits of time and memory.

The sandbox keeps a template away from files and from Python's insides. It does not keep it from loops within loops, or
from texts that double: here turns of loops, calls of macros and the lengths of texts and lists are counted.
"""

import json
import re
import string
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

import jinja2.ext
from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import TemplateError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_WORK = 50_000_000
"""Units of one rendering: a character is one."""
STEP, ELEMENT, POINTER = 2000, 100, 8
"""Units of a turn of a loop, of an element of a list, and of one that stays in a longer list."""
MAX_CHARACTERS = 10_000_000
"""Of one text, and of all that a rendering writes; and the largest number that a function is given."""
MAX_BITS = 10_000
"""Of a whole number."""
SHALLOW = frozenset(("length", "count", "first", "last", "default", "d"))
"""Filters that look at no element of a list: `messages | length` in a loop over messages is no work."""
COMPARING = ("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le",
             "in")  # fmt: skip
"""Tests that look into lists within lists."""
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0 +-]*(\*|\d+)?(?:\.(\*|\d+))?")
"""A conversion's width and precision."""
_FIELD = re.compile(r"\{|\d+")
"""What a field's specification holds of numbers, or of fields within it."""
MAX_INDENT = 32
"""Of JSON, in characters a level."""
_state = threading.local()


class TooMuch(TemplateError):
    """A template exceeds a limit."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any],
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` renders it.

    Args:
      special_tokens: by their names, such as bos_token.
      options: the template's own.

    Raises:
      TemplateError: a broken template, one that refuses the conversation, or one that exceeds a limit.
    """
    if not messages:
        raise TemplateError("empty conversation")
    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    known = {"messages": turns, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    _state.work = 0
    try:
        return _compiled(template).render({**special_tokens, **known, **options})
    except RecursionError as error:
        raise TooMuch("it calls itself too deeply") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return _Bounded().from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant writes; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates, with limits."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters = {name: _measured(name, function) for name, function in self.filters.items()}
        own = (_counted, _step, _joined, _compared, _searched, _sliced)
        self.filters |= {function.__name__: function for function in own}
        self.tests |= {name: _comparing(self.tests[name]) for name in COMPARING}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime}
        del self.globals["lipsum"]
        self.finalize = _finalized
        self.concat = _concat  # type: ignore[assignment]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_counted")
        # also of loops and macros that call themselves
        for block in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            block.body.insert(0, nodes.Output([_filtered(nodes.Const(""), "_step")]))
        for comparison in list(tree.find_all(nodes.Compare)):
            for side in (comparison, *comparison.ops):
                side.expr = _filtered(side.expr, "_searched" if _looks_into(side) else "_compared")
        return _with_counts(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        if operator == "%":
            _charge(right)
            if isinstance(left, str):
                _check_format(left, right, percent=True)
        result = super().call_binop(context, operator, left, right)
        return _copied(result)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(wrapped)
        def measured(*args: Any, **kwargs: Any) -> str:
            _charge([*args, *kwargs.values()])
            _check_format(value.__self__, [*args, *kwargs.values()], percent=False)
            return wrapped(*args, **kwargs)

        return measured

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and getattr(__obj, "__name__", "") == "join":
            args = tuple(list(_counted(None, one)) if isinstance(one, Iterator) else one for one in args)
        _check_arguments(getattr(__obj, "__name__", ""), owner, args, kwargs)
        if isinstance(owner, list | tuple):
            # index and count compare elements
            _charge([owner, *args])
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, bytes):
            raise TooMuch("it makes bytes, whose work is not counted")
        _charge(owner if isinstance(owner, str | list | dict) else None)
        _charge(result)
        return result


def _charge(value: Any) -> None:
    """Counts a value's characters and elements, also those of elements."""
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise TooMuch(f"it makes a text of more than {MAX_CHARACTERS} characters")
        return _add(len(value))
    if isinstance(value, range):
        return _add(STEP)
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | tuple | dict):
            _add(ELEMENT * (1 + len(one)))
            waiting += [*one.values()] if isinstance(one, dict) else one
        else:
            _add(len(one) if isinstance(one, str) else 1)
    return None


def _add(units: int) -> None:
    _state.work += units
    if _state.work > MAX_WORK:
        raise TooMuch("it takes too many steps for one conversation: its loops or macros do not end")


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Raises TooMuch where the result would not fit into memory."""
    if isinstance(left, int) and isinstance(right, int):
        bits = {"**": left.bit_length() * abs(right), "*": left.bit_length() + right.bit_length()}.get(operator, 0)
        if bits > MAX_BITS:
            raise TooMuch(f"it makes a number of more than {MAX_BITS} bits")
    for text, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(text, str | list | tuple) and isinstance(times, int):
            size = len(text) * max(times, 0)
            if size * (1 if isinstance(text, str) else ELEMENT) > MAX_CHARACTERS:
                raise TooMuch(f"it makes a text of more than {MAX_CHARACTERS} characters")


def _check_arguments(name: str, owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises TooMuch where a function would write a very long text."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_CHARACTERS and name not in ("format", "format_map"):
            raise TooMuch(f"it calls {name} with a number above {MAX_CHARACTERS}")
    given = [*args, *kwargs.values()]
    longest = max((len(value) for value in given if isinstance(value, str)), default=0)
    largest = max((abs(value) for value in given if isinstance(value, int)), default=0)
    if name == "tojson":
        longest = max(longest, *(len(one) for one in _leaves(given) if isinstance(one, str)), 0)
        if max(largest, longest) > MAX_INDENT:
            raise TooMuch(f"it calls tojson with an indent or a separator of more than {MAX_INDENT}")
        size = _depth(owner) * _extent(owner) * (1 + max(largest, longest))
    elif name in ("batch", "slice"):
        size = largest * ELEMENT
    elif not isinstance(owner, str):
        return
    elif name == "join":
        size = len(owner) * max((len(value) for value in args if isinstance(value, list | tuple | str)), default=0)
    elif name == "translate":
        raise TooMuch("it calls translate, whose work is not counted")
    elif name in ("replace", "urlize", "wordwrap"):
        size = (len(owner) + 1) * longest
    elif name == "indent":
        size = len(owner.splitlines()) * max(largest, longest)
    elif name == "expandtabs":
        size = owner.count("\t") * largest
    elif name in ("split", "rsplit", "splitlines"):
        marks = [value for value in given if isinstance(value, str) and value]
        size = ELEMENT * (owner.count(marks[0]) if marks else len(owner)) // 2
    else:
        return
    if size > 10 * MAX_CHARACTERS:
        raise TooMuch(f"it makes a text of more than {MAX_CHARACTERS} characters by {name}")


def _check_format(text: str, values: Any, *, percent: bool) -> None:
    """Raises TooMuch where a format would write a very long text: by values that it repeats, or by widths.

    Args:
      percent: whether it is Python's older form, of the operator %.
    """
    if percent:
        fields = [found.groups() for found in _PERCENT.finditer(text)]
        widths = [width for field in fields for width in field if width]
    else:
        try:
            specs = [spec or "" for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
        except ValueError:
            return  # which the call itself says
        fields, widths = specs, [width for spec in specs for width in _FIELD.findall(spec)]
    if any(not width.isdecimal() for width in widths):
        raise TooMuch("it formats a text with a width that a value gives")
    longest = max(map(_extent, values.values() if isinstance(values, dict) else _sequence(values)), default=0)
    if len(fields) * longest + sum(int(width[:12]) for width in widths) > MAX_CHARACTERS:
        raise TooMuch(f"it formats a text of more than {MAX_CHARACTERS} characters")


def _sequence(values: Any) -> Sequence[Any]:
    return values if isinstance(values, list | tuple) else [values]


def _leaves(value: Any) -> Iterator[Any]:
    """What is in lists within lists."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | tuple | dict):
            waiting += [*one.values()] if isinstance(one, dict) else one
        else:
            yield one


def _extent(value: Any) -> int:
    """Characters of a value's texts, about, and its other elements."""
    return sum(len(one) if isinstance(one, str) else 8 for one in _leaves(value))


def _depth(value: Any) -> int:
    """How deep lists lie within lists."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, list | tuple | dict)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth + 1


def _measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are counted."""

    @wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        # the first ones may be Jinja's own: context, evaluation context or environment
        plain = [value for value in args if isinstance(value, str | list | tuple | dict | int | float)]
        owner = plain[0] if plain else None
        if name == "join":
            args = tuple(list(_counted(None, one)) if isinstance(one, Iterator) else one for one in args)
            plain = [value for value in args if isinstance(value, str | list | tuple | dict | int | float)]
            owner = plain[0] if plain else None
        if name in SHALLOW:
            _add(ELEMENT)
            return function(*args, **kwargs)
        _charge(plain)
        _check_arguments(name, owner, plain[1:], kwargs)
        if name == "format" and isinstance(owner, str):
            _check_format(owner, [*plain[1:], *kwargs.values()], percent=True)
        if name == "join" and isinstance(owner, list | tuple):
            _check_arguments(name, next((v for v in plain[1:] if isinstance(v, str)), ""), [owner], {})
        result = function(*args, **kwargs)
        if isinstance(result, str | list | tuple | dict):
            _charge(result)
            return result
        return _counted(None, result) if isinstance(result, Iterator) else result

    return measured


@pass_context
def _counted(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    """The same values, each a step."""
    for value in values:
        _add(STEP)
        yield value


@pass_context
def _step(context: Any, value: str) -> str:
    _add(STEP)
    return value


@pass_context
def _compared(context: Any, value: Any) -> Any:
    """A side of a comparison, whose work grows with the lists in it."""
    if isinstance(value, list | tuple | dict):
        _charge(value)
    return value


@pass_context
def _searched(context: Any, value: Any) -> Any:
    """What `in` looks into: of a mapping the keys alone are searched, so `'tool_calls' in message` is no work."""
    _charge(1 if isinstance(value, dict) else value)
    return value


def _comparing(test: Callable[..., bool]) -> Callable[..., bool]:
    """A test whose arguments are counted as those of `_compared`."""

    @wraps(test)
    def comparing(*args: Any) -> bool:
        _charge([value for value in args if isinstance(value, list | tuple | dict)])
        return test(*args)

    return comparing


@pass_context
def _sliced(context: Any, value: Any) -> Any:
    """A part of a text or a list, which is a copy."""
    return _copied(value)


def _copied(value: Any) -> Any:
    """Counts a value whose elements, if it is a list, are there already."""
    if isinstance(value, list | tuple):
        _add(POINTER * len(value))
    else:
        _charge(value)
    return value


@pass_context
def _joined(context: Any, parts: Sequence[Any]) -> str:
    """Texts after each other, as `~` joins them."""
    return _concat(str(_finalized(part)) for part in parts)


def _concat(parts: Iterable[str]) -> str:
    kept, size = list[str](), 0
    for part in parts:
        size += len(part)
        if size > MAX_CHARACTERS:
            raise TooMuch(f"it makes a text of more than {MAX_CHARACTERS} characters")
        kept.append(part)
    _add(size)
    return "".join(kept)


def _finalized(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and hasattr(_state, "work"):
        _charge(value)
    return value


def _looks_into(side: Any) -> bool:
    return isinstance(side, nodes.Operand) and side.op in ("in", "notin")


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _with_counts(tree: Any) -> Any:
    """The same tree with filters in place of what the sandbox does not see: every `~`, and around every slice."""
    for field, value in list(tree.iter_fields()):
        if isinstance(value, list):
            setattr(tree, field, [_with_counts(v) if isinstance(v, nodes.Node) else v for v in value])
        elif isinstance(value, nodes.Node):
            setattr(tree, field, _with_counts(value))
    if isinstance(tree, nodes.Concat):
        return _filtered(nodes.List(tree.nodes), "_joined")
    if isinstance(tree, nodes.Getitem) and isinstance(tree.arg, nodes.Slice):
        return _filtered(tree, "_sliced")
    return tree


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes HTML
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime(form: str) -> str:
    """One day for ever: else a run could not be repeated or resumed on another day."""
    day = {"Y": "2024", "y": "24", "m": "07", "d": "26", "B": "July", "b": "Jul", "A": "Friday", "a": "Fri"}
    return re.sub("%([YymdBbAa])", lambda code: day[code[1]], form)
