"""Interpolations in configuration files: other keys' values may be used, and nothing is called."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from mpo_jax.errors import UserError

MOST = 20
"""Interpolations in one line."""
MAX_CHARACTERS = 100_000
"""Of a value, once its interpolations are resolved. The longest are templates of a few thousand."""
MOST_STEPS = 100
"""From key to key."""
_REFERENCE = re.compile(r"\$\{\s*([^${}\s]+)\s*\}")


def refuse_resolvers(loaded: Any, where: str | Path) -> None:
    """Checks an OmegaConf container before anything is resolved; merging resolves too.

    Raises:
      UserError: for `${name:...}` at any depth. Resolvers such as `oc.env` read the environment, and what they return
        would be printed and stored with the run.
    """
    for key, text in _texts(OmegaConf.to_container(loaded, resolve=False), ""):
        if "${" not in text:
            continue
        try:
            called = _calls_resolver(parse(text))
        except (OmegaConfBaseException, RecursionError) as error:
            raise UserError(f"{where}: {key}: broken interpolation: write ${{section.key}}, or \\${{") from error
        if called:
            raise UserError(
                f"{where}: {key} calls a resolver, ${{name:...}}. Resolvers are never run, since they can read secrets "
                "from the environment: write the value itself, give it on the command line, or refer to another key of "
                "the same file, as in ${seed}"
            )


def refuse_many(text: str, where: str | Path) -> None:
    """Checks text before OmegaConf reads it, whose parser recurses into interpolations.

    Raises:
      UserError: for a line with more than MOST interpolations.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if line.count("${") > MOST:
            raise UserError(f"{where}:{number}: more than {MOST} interpolations in a line: write the value itself")


def refuse_growth(loaded: Any, where: str | Path) -> None:
    """Checks how long the texts of a whole configuration get before they are resolved: ten keys that each name the
    next one twice are short, and forty of them fill the memory.

    Raises:
      UserError: for a key whose text gets longer than MAX_CHARACTERS; names it.
    """
    raw = dict(_texts(OmegaConf.to_container(loaded, resolve=False), ""))
    texts = {_dotted(key): text for key, text in raw.items()}
    known: dict[str, str] = {}

    def expanded(key: str, above: tuple[str, ...]) -> str:
        if key in above:  # left to OmegaConf, which names it
            return ""
        if len(above) > MOST_STEPS:
            raise UserError(f"{where}: {above[0]} leads over more than {MOST_STEPS} keys: write the value itself")
        if key not in texts:  # a section, or no text
            return "x" + "".join("x" + expanded(one, (*above, key)) for one in texts if one.startswith(f"{key}."))
        if key not in known:
            text = texts[key]
            while found := _REFERENCE.search(text):
                inside = expanded(_absolute(found[1], key), (*above, key))
                text = text[: found.start()] + inside + text[found.end() :]
                if len(text) > MAX_CHARACTERS:
                    raise UserError(
                        f"{where}: {key} gets longer than {MAX_CHARACTERS} characters by its interpolations: write the "
                        "value itself"
                    )
            known[key] = text
        return known[key]

    for key, text in texts.items():
        if "${" in text:
            expanded(key, ())


def literal(value: Any) -> Any:
    """The same nested values with every `${` escaped, so that OmegaConf reads it as text."""
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [literal(part) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _absolute(reference: str, key: str) -> str:
    """The key that a reference names: `.b` beside `a.x` is `a.b`, and each further dot leads one section up."""
    name = reference.lstrip(".")
    if dots := len(reference) - len(name):
        parts = key.split(".")
        name = ".".join([*parts[: max(0, len(parts) - dots)], name])
    return _dotted(name)


def _dotted(key: str) -> str:
    """`a[0].b` as `a.0.b`."""
    return key.replace("[", ".").replace("]", "").strip(".")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All strings with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _texts(part, f"{key}[{number}]")


def _calls_resolver(tree: Any) -> bool:
    resolver = isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext)
    return resolver or any(map(_calls_resolver, getattr(tree, "children", None) or ()))
