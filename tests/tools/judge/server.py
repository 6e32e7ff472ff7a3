"""A chat completions server on this machine that answers as real ones do on bad days."""

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Act:
    """What the server does with one request.

    Attributes:
      body: bytes, or text that becomes the content of a completion.
      wait: seconds before the first byte.
      cut: bytes after which it hangs up; None for none.
      drip: seconds between two bytes.
    """

    body: str | bytes = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    cut: int | None = None
    drip: float = 0.0
    finish: str = "stop"


def completion(text: str | None, finish: str = "stop") -> bytes:
    """What a chat completions server sends."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def scores(first: Any, second: Any) -> str:
    return f"Response 1 Quality Score: {first}\nExplanation: a.\nResponse 2 Quality Score: {second}\nExplanation: b."


def words(prompt: str) -> tuple[int, int]:
    """The number of words of each response in the project's own prompt."""
    found = [re.search(rf"\[Start of response {n}\]\n(.*?)\n\[End", prompt, re.DOTALL) for n in (1, 2)]
    return tuple(min(len(m[1].split()), 10) for m in found if m)  # type: ignore[return-value]


def by_words(prompt: str) -> str:
    """A judge that likes words."""
    return scores(*words(prompt))


Behaviour = Callable[[str, int], Act]
"""From a prompt, and how often it was asked before, to what is done."""


class JudgeServer:
    """Records requests (`bodies`, `headers`), and how many were under way at once (`most`)."""

    def __init__(self, behave: Behaviour):
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most = self._now = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.behave = behave
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with outer._lock:
                    outer.times.append(time.monotonic())
                    outer.bodies.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    before = outer._seen[prompt]
                    outer._seen[prompt] += 1
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    act = (
                        outer.behave(prompt, before) if self.path.endswith("/v1/chat/completions") else Act(status=404)
                    )
                    # a client that has given up is no error of the server's
                    with contextlib.suppress(ConnectionError):
                        self._do(act)
                finally:
                    with outer._lock:
                        outer._now -= 1

            def _do(self, act: Act) -> None:
                outer.stop.wait(act.wait)
                whole = completion(act.body, act.finish) if isinstance(act.body, str) else act.body
                self.send_response(act.status)
                for name, value in {"Content-Type": "application/json", **act.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                for byte in range(len(whole)) if act.drip else ():
                    self.wfile.write(whole[byte : byte + 1])
                    self.wfile.flush()
                    if outer.stop.wait(act.drip):
                        break
                if not act.drip:
                    self.wfile.write(whole[: act.cut])
                if act.cut is not None:
                    self.close_connection = True

        self.stop = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def calls(self) -> int:
        return len(self.bodies)

    def __enter__(self) -> "JudgeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def serving(behave: Behaviour) -> Iterator[JudgeServer]:
    """A server for the time of a test."""
    with JudgeServer(behave) as server:
        yield server
