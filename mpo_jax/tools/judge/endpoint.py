"""A judge behind an OpenAI-compatible endpoint: where it is, what it is asked for, and what that will take.

The packages that make the calls are imported with the first call, so that a dry run needs neither them nor a key.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from mpo_jax.errors import UserError
from mpo_jax.tools.judge.cache import content_key
from mpo_jax.tools.judge.calls import Call, Done

KEY = "OPENAI_API_KEY"
BYTES_A_TOKEN = 4


class Endpoint:
    """Chat completions at `url`.

    Args:
      url: the base, such as http://localhost:8000/v1.
      model: its name there.
      fields: of the request besides model and messages; those that are None are left out.
      concurrency: calls under way at once.
      tries: of one call at most, the first included.
      timeout_s: of one try, from the request to the answer's last byte.

    Raises:
      UserError: for a URL that cannot be used.
    """

    def __init__(
        self, url: str, model: str, fields: Mapping[str, Any], *, concurrency: int, tries: int, timeout_s: float
    ):
        self.url, self.model = _checked_url(url), model
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.concurrency, self.tries, self.timeout_s = concurrency, tries, timeout_s

    @property
    def max_tokens(self) -> int | None:
        return self.fields.get("max_tokens", self.fields.get("max_completion_tokens"))

    def key(self, prompt: str) -> str:
        return content_key("endpoint", self.url, self.model, json.dumps(self.fields, sort_keys=True), prompt)

    def count_tokens(self, calls: Sequence[Call]) -> tuple[int, str]:
        tokens = sum(-(-len(call.prompt.encode("utf-8", "replace")) // BYTES_A_TOKEN) for call in calls)
        return tokens, f"estimated: a token for every {BYTES_A_TOKEN} bytes of UTF-8; the judge's own tokenizer decides"

    def ask(self, calls: Sequence[Call], done: Done) -> None:
        secret = api_key()
        try:
            from mpo_jax.tools.judge import client
        except ImportError as error:
            raise UserError(
                "a judge at an endpoint needs the packages openai and tenacity, which are not both installed: "
                "pip install openai tenacity (or: bash launch/setup.sh judge)"
            ) from error
        client.ask(self, secret, calls, done)


def api_key() -> str | None:
    """The environment's key; None without one, as servers of one's own need none.

    Raises:
      UserError: for one that fits no header: the HTTP library would show it in its error.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the environment variable {KEY} holds a character that no key has: set it again")
    return key or None


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        parts, usable = urlsplit(""), False
    if not usable:
        raise UserError("--endpoint wants a URL such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query:
        raise UserError(f"--endpoint must hold no password or key: put the key into the environment variable {KEY}")
    return url.rstrip("/").removesuffix("/chat/completions")
