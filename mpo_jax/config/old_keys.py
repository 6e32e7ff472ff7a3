"""Keys that were renamed or removed. A configuration that still sets one is refused with what to write instead."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpo_jax.errors import UserError

RENAMED = {
    "ppo.discount": "ppo.gamma",
    "ppo.trace": "ppo.gae_lambda",
    "ppo.policy_clip": "ppo.clip_eps",
    "ppo.value_clip": "ppo.value_clip_eps",
    "runtime.keep_checkpoints": "runtime.keep_finished_checkpoints",
}
"""Old name to new name."""

_PPO_DOES_NOT_TRUNCATE = (
    "PPO never truncates its sampling (top_p=1, top_k=0): a truncated sampler draws from another distribution than the "
    "one whose log-probabilities PPO uses, so ratios and KL would be wrong (KL even negative)"
)

REMOVED = {"ppo.top_p": _PPO_DOES_NOT_TRUNCATE, "ppo.top_k": _PPO_DOES_NOT_TRUNCATE}
"""Old name to the reason why the key is gone."""


def refuse_old_keys(keys: Iterable[str], where: str | Path) -> None:
    """Raises UserError if any of the dotted keys, or a section above it, was renamed or removed; names all of them."""
    found = {}
    for key in keys:
        for old in (old for old in (*RENAMED, *REMOVED) if f"{key}.".startswith(f"{old}.")):
            if old in RENAMED:
                found[old] = f"{where}: {old} is called {RENAMED[old]} now: write {RENAMED[old]}"
            else:
                found[old] = f"{where}: there is no key {old} any more: remove it. {REMOVED[old]}"
    if found:
        raise UserError("\n".join(found.values()))


def dotted(values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of a nested mapping, sections included."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from dotted(value, f"{prefix}{key}.")


def renamed(values: Any) -> Any:
    """A nested mapping with old keys under their new names, and without the removed ones."""
    if not isinstance(values, dict):
        return values
    for old in (*RENAMED, *REMOVED):
        section, _, name = old.rpartition(".")
        inner = values.get(section)
        if isinstance(inner, dict) and name in inner:
            value = inner.pop(name)
            if old in RENAMED:
                inner.setdefault(RENAMED[old].rpartition(".")[2], value)
    return values
