"""An emulated Google Cloud Storage in a process of its own:  python -m tests.google_bucket PORT

The emulator lacks three things that TensorStore needs, which writes checkpoints: more than one connection (its server
has one thread, which waits for the next request of a connection that a client keeps), the generation of an object that
is read, and writing on condition that an object is still of a generation.
"""

import http.server
import sys
import threading
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlparse

http.server.HTTPServer = http.server.ThreadingHTTPServer  # type: ignore[misc]  # before the emulator takes it

from gcp_storage_emulator import server  # noqa: E402
from gcp_storage_emulator.exceptions import NotFound  # noqa: E402

# its storage is not made for several threads
one_at_a_time = threading.Lock()


class Handler(server.RequestHandler):
    """Requests with generations."""

    read: str | None = None
    """Of the object that is being read."""

    def generation(self, bucket: str, name: str) -> str:
        """Of an object; 0 where there is none, as conditions have it."""
        try:
            return self.storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"

    def do_GET(self) -> None:
        with one_at_a_time:
            address = urlparse(self.path)
            if "media" in parse_qs(address.query).get("alt", []):
                bucket, _, name = address.path.partition("/b/")[2].partition("/o/")
                self.read = self.generation(bucket, unquote(name))
            super().do_GET()
            self.read = None

    def do_POST(self) -> None:
        with one_at_a_time:
            address = urlparse(self.path)
            query = parse_qs(address.query)
            if wanted := query.get("ifGenerationMatch"):
                bucket = address.path.partition("/b/")[2].partition("/")[0]
                if self.generation(bucket, query["name"][0]) != wanted[0]:
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    self.send_error(HTTPStatus.PRECONDITION_FAILED)
                    return
            super().do_POST()

    def do_DELETE(self) -> None:
        with one_at_a_time:
            super().do_DELETE()

    def end_headers(self) -> None:
        if self.read not in (None, "0"):
            self.send_header("x-goog-generation", str(self.read))
        super().end_headers()


if __name__ == "__main__":
    server.RequestHandler = Handler
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True).run()
