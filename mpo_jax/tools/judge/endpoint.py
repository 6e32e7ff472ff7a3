"""An OpenAI-compatible endpoint: where it is, what a request holds, and the key."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from mpo_jax.credentials import find
from mpo_jax.errors import UserError

KEY = "OPENAI_API_KEY"
LIMITS = ("max_tokens", "max_completion_tokens")
"""The fields of a request that limit an answer's tokens: the older name and the newer one."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Chat completions at `url`.

    Attributes:
      url: the base, such as http://localhost:8000/v1.
      model: its name there.
      fields: the request's fields besides model and messages.
      concurrency: the largest number of calls at once.
      tries: the largest number of tries of one call, the first included.
      timeout_s: the time limit of one try, from the request to the answer's last byte.
    """

    url: str
    model: str
    fields: Mapping[str, Any]
    concurrency: int
    tries: int
    timeout_s: float

    @classmethod
    def of(
        cls, url: str, model: str, fields: Mapping[str, Any], *, concurrency: int, tries: int, timeout_s: float
    ) -> "Endpoint":
        """An endpoint from what a user gave; fields that are None are left out of the request.

        Raises:
          UserError: if the URL cannot be used, a limit of an answer's tokens is no positive integer, or the model's
            name, which the result repeats, holds credentials.
        """
        if (what := find(model)) is not None:
            raise UserError(f"--model holds {what}: put the key into the environment variable {KEY}")
        kept = {name: value for name, value in fields.items() if value is not None}
        for name in LIMITS:
            limit = kept.get(name, 1)
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
                raise UserError(f"--request: {name}={limit!r} must be a positive integer, or null to leave it out")
        return cls(checked_url(url), model, kept, concurrency, tries, timeout_s)


def api_key() -> str | None:
    """The environment's key; None where it is not set, since local servers need none.

    Raises:
      UserError: if the key does not fit into a header: the HTTP library would show it in its error.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the environment variable {KEY} holds a character that no key has: set it again")
    return key or None


def checked_url(url: str) -> str:
    """The base URL without a trailing slash or path of the API.

    Raises:
      UserError: if it is no URL, or holds a password, a key, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        parts, usable = urlsplit(""), False
    if not usable:
        raise UserError("--endpoint wants a URL such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or "#" in url or "?" in url or find(url) is not None:
        raise UserError(f"--endpoint must hold no password or key: put the key into the environment variable {KEY}")
    return url.rstrip("/").removesuffix("/chat/completions")
