"""Which keys a user has set, and where: for messages about a key that has no effect."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """The dotted names of the keys that a configuration was made from, sections included.

    It is equal to any other: configurations of equal values are equal, whoever set them.

    Attributes:
      command_line: keys of the overrides KEY=VALUE.
      files: keys of each YAML file.
    """

    command_line: frozenset[str] = frozenset()
    files: tuple[frozenset[str], ...] = ()

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Given)

    def __hash__(self) -> int:
        return 0

    def has(self, key: str) -> bool:
        """Whether a user has set the key."""
        return any(key in keys for keys in (self.command_line, *self.files))

    def without_effect(self, prefix: str, why: str | None) -> list[str]:
        """The keys under a prefix that a user has set in vain, as he wrote them.

        A file is meant for more than one run: its keys count where the reason is in the same file.

        Args:
          prefix: dotted name of a key or section.
          why: the key that takes the effect from them; None: the absence of another key.
        """
        vain = [keys for keys in self.files if why is None or why in keys]
        found = {
            key for keys in (self.command_line, *vain) for key in keys if key == prefix or key.startswith(f"{prefix}.")
        }
        # a section is there for its keys
        return sorted(key for key in found if not any(other.startswith(f"{key}.") for other in found))
