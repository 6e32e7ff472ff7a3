"""Credentials in text: found, so that a configuration that would store them is refused, and hidden in messages.

What has no known form, such as a password by itself, cannot be told from other text.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote

HIDDEN = "***"
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "FSSPEC_S3_KEY", "FSSPEC_S3_SECRET", "FSSPEC_S3_TOKEN", "FSSPEC_GCS_TOKEN",
)  # fmt: skip
"""Environment variables that are credentials, of the services that runs use."""
ADDRESSES = ("HF_ENDPOINT", "WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""Environment variables that may hold an address with a user and password; libraries read them in small letters too."""
SHORTEST = 8
"""Characters of a variable's value that is looked for: shorter ones, such as a test's `x`, are parts of words."""

_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      hf_[A-Za-z0-9]{20,}                                                              # Hugging Face
    | sk-(?:[A-Za-z0-9]{20,} | (?:proj|svcacct|admin|ant|or)-[\w-]{20,})               # OpenAI and its like
    | wandb_v\d+_\w{20,}
    | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,} | glpat-[\w-]{20,}               # GitHub, GitLab
    | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9]) | AIza[\w-]{35} | ya29\.[\w-]{20,}      # AWS, Google
    | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+                                             # JSON Web Token
    )""",
    re.VERBOSE,
)
_SCHEME = r"[A-Za-z][\w+.-]*:(?:[\w+.-]*:)?/{1,2}"
"""Also behind a further name, as in hub:https://..., and with one slash, which some libraries take for two."""
_SLASHES = r"(?<=[\w+.-]):/{1,2}"
"""Its end, to search for: a search for the whole would begin at every letter, and read to the end of the word."""
# in the second form the password holds a slash; the digits are a port, before a path with an @ in it. Without limits
# the search would take minutes in a text of colons and slashes
_USER = r"(?:[^\s/?#'\"]{0,1000}|[^\s/@'\"]{0,1000}:(?!\d{0,5}/)[^\s@'\"]{0,1000})@"
_WITH_USER = re.compile(rf"({_SLASHES}){_USER}")
_ADDRESS = re.compile(rf"\s*{_SCHEME}(?:(?<=//).*|\S*\s*)\Z", re.DOTALL)
_TAIL = re.compile(rf"({_SLASHES}[^\s?#'\"<>]{{0,1000}}[?#])[^\s'\"<>]+")
_PARAMETER = re.compile(
    r"([?&#;][\w.-]*(?:token|key|secret|signature|sig|password|credential)=)[^\s&'\"<>]+", re.IGNORECASE
)
"""Also behind an address with a space in it."""


def find(text: str) -> str | None:
    """What credentials a text holds, in words without them; None if it holds none that are known.

    A query or a fragment counts where the whole text is an address: a prompt may well quote a link.
    """
    return finder()(text)


def finder() -> Callable[[str], str | None]:
    """`find` for many texts, with the environment of now."""
    of_environment = list(_of_environment())

    @functools.cache
    def find_in(text: str) -> str | None:
        for name, value in of_environment:
            if value in text:
                return f"the value of the environment variable {name}"
        if _TOKEN.search(text):
            return "what looks like an access token"
        if ("@" in text and _WITH_USER.search(text)) or (re.search("[?#]", text) and _ADDRESS.match(text)):
            return "an address with a user, password, query or fragment, where secrets stand"
        if _PARAMETER.search(text):
            return "a parameter that names a token, key or password"
        return None

    return find_in


def hide(text: str) -> str:
    """The text with every credential that is known, and every query and fragment of an address, as `***`."""
    for _, value in _of_environment():
        text = text.replace(value, HIDDEN)
    text = _WITH_USER.sub(rf"\g<1>{HIDDEN}@", _TOKEN.sub(HIDDEN, text))
    return _PARAMETER.sub(rf"\g<1>{HIDDEN}", _TAIL.sub(rf"\g<1>{HIDDEN}", text))


def _of_environment() -> Iterator[tuple[str, str]]:
    """Variables and the credentials in them, each as it is and as it is encoded in the address."""
    for name in VARIABLES:
        if len(value := os.environ.get(name, "").strip()) >= SHORTEST:
            yield name, value
    for name in (*ADDRESSES, *map(str.lower, ADDRESSES)):
        user, at, _ = os.environ.get(name, "").partition("://")[2].partition("/")[0].rpartition("@")
        password = user.partition(":")[2] or user
        if at and len(password) >= SHORTEST:
            yield from ((name, one) for one in dict.fromkeys((password, unquote(password))))
