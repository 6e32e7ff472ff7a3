"""YAML files and `key.sub=value` overrides to a configuration, and back. Unknown keys are refused."""

import difflib
import io
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mpo_jax.config.base import BY_NAME, refuse_credentials
from mpo_jax.config.given import Given
from mpo_jax.config.interpolation import literal, refuse_growth, refuse_many, refuse_resolvers
from mpo_jax.config.old_keys import dotted, refuse_old_keys, renamed
from mpo_jax.config.schema import TRAINED, Config
from mpo_jax.config.suggestion import suggest
from mpo_jax.errors import UserError
from mpo_jax.untrusted import check_yaml, loading_yaml, read_text, read_yaml, reason

COMMAND_LINE = "the command line"


def load_config(path: str | Path | None, overrides: tuple[str, ...] = (), *, stage: str | None = None) -> Config:
    """Reads YAML, merges the overrides in order and validates.

    Args:
      path: a YAML file; None for the defaults.
      overrides: each `key.sub=value`, or the path of a further YAML file to merge.
      stage: section that `train.KEY=value` belongs to; None: such a short key is an error.

    `${a.b}` stands for another key's value. `${name:...}` is refused: a resolver such as `oc.env` would put secrets of
    the environment into what a run prints and stores.

    Raises:
      UserError: naming the file and line, or the key, and what to do.
    """
    merged: Any = OmegaConf.create({}) if path is None else _read_yaml(Path(path))
    path, files, command_line = path or COMMAND_LINE, [_keys(merged)], frozenset[str]()
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            if equals:
                # before anything quotes a part of it
                refuse_credentials({key: value}, COMMAND_LINE)
                key = _whole_key(key.strip(), stage)
                refuse_old_keys([key], COMMAND_LINE)
                _refuse_unknown(key, "on the command line")
                check_yaml(value, f"the override {key}")
                refuse_many(value, f"the override {key}")
                update = _checked(_from_dotlist(key, value), COMMAND_LINE)
                command_line |= _keys(update)
            else:
                update = _read_yaml(Path(override))
                files.append(_keys(update))
            merged = OmegaConf.merge(merged, update)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"cannot read the override {override!r}: {_first_line(error)}") from error
    refuse_growth(merged, path)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    refuse_credentials(values, path)  # an interpolation may have put an address together
    try:
        return Config.model_validate(values).set_by(Given(command_line, tuple(files)))
    except ValidationError as error:
        raise UserError(_explain(error, path)) from error


def read_record(path: Path) -> Config:
    """The configuration that a run left in its folder, also one of an earlier version: old keys get their new names.

    Raises:
      UserError: as `load_config`.
    """
    values = renamed(read_yaml(path))
    refuse_credentials(values, path)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, path)) from error


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    values = literal(config.model_dump(mode="json"))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> Any:
    if not path.exists():
        nearby = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / nearby[0]}?" if nearby else ""
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{path} is neither KEY=VALUE nor a configuration file (YAML) that exists")
        raise UserError(f"no configuration file {path}{hint}")
    text = read_text(path)
    check_yaml(text, path)
    refuse_many(text, path)
    with loading_yaml(path):
        loaded = OmegaConf.load(io.StringIO(text))
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path}: a configuration is a mapping of keys to values, not a list")
    return _checked(loaded, path)


def _keys(loaded: Any) -> frozenset[str]:
    return frozenset(dotted(OmegaConf.to_container(loaded, resolve=False)))


def _from_dotlist(key: str, value: str) -> Any:
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except (OmegaConfBaseException, yaml.YAMLError):
        raise
    except Exception as error:  # as of a file's tags
        raise UserError(f"cannot read the override {key}={value[:40]}: {reason(error)}") from error


def _checked(loaded: Any, where: str | Path) -> Any:
    """The container itself.

    Raises:
      UserError: if it calls a resolver, holds credentials, or sets a key that was renamed or removed.
    """
    refuse_resolvers(loaded, where)
    refuse_credentials(OmegaConf.to_container(loaded, resolve=False), where)
    refuse_old_keys(dotted(OmegaConf.to_container(loaded, resolve=False)), where)
    return loaded


def _whole_key(key: str, stage: str | None) -> str:
    """The key from the root; `train...` alone means the stage that the command is named after."""
    if key.partition(".")[0] != "train":
        return key
    if stage is None:
        raise UserError(
            f"{key} on the command line: which stage's? Write {' or '.join(f'{name}.{key}' for name in TRAINED)}. The "
            f"short key is for the commands mpo {', '.join(TRAINED)}, which name the stage"
        )
    return f"{stage}.{key}"


def _refuse_unknown(key: str, where: str) -> None:
    section: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        fields = getattr(section, "model_fields", None)
        if fields is None or part not in fields:
            known = list(fields) if fields else []
            raise UserError(f"unknown key {'.'.join(parts[: depth + 1])} {where}{suggest(part, known)}")
        kind: Any = fields[part].annotation
        if kind in BY_NAME:
            return
        # of a section that may be absent, the section
        section = next((one for one in get_args(kind) if hasattr(one, "model_fields")), kind)


def _explain(error: ValidationError, path: str | Path) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            try:
                _refuse_unknown(key, f"in {path} or its overrides")
            except UserError as unknown:
                lines.append(str(unknown))
                continue
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in ("tuple_type", "list_type"):
            message = "Input should be a list, such as [a, b]"
        value = problem["input"]
        given = (
            "" if isinstance(value, dict | BaseModel) else f" (given: {'nothing' if value is None else repr(value)})"
        )
        lines.append(f"{path}: {key + ': ' if key else ''}{message}{given}")
    return "\n".join(lines)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
