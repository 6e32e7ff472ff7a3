"""A judge at an endpoint.

The packages that make the calls are imported with the first call, so that a dry run needs neither them nor a key.
"""

import dataclasses
import json
from collections.abc import Sequence

from mpo_jax.errors import UserError
from mpo_jax.tools.judge.cache import content_key
from mpo_jax.tools.judge.calls import Call, Done
from mpo_jax.tools.judge.endpoint import LIMITS, Endpoint, api_key

BYTES_A_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class RemoteJudge:
    """The model at an endpoint."""

    endpoint: Endpoint

    @property
    def max_tokens(self) -> int | None:
        """The limit of an answer's tokens; None where the request has none."""
        return next((self.endpoint.fields[name] for name in LIMITS if name in self.endpoint.fields), None)

    def key(self, prompt: str) -> str:
        endpoint = self.endpoint
        return content_key(
            "endpoint", endpoint.url, endpoint.model, json.dumps(endpoint.fields, sort_keys=True), prompt
        )

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
        client.ask(self.endpoint, secret, calls, done)
