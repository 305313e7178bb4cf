"""A server of one file for tests: honours ranges and versions, and misbehaves by plan.

In a test:    with file_server(body) as server: server.plan = ["cut", 503]; … server.url, server.starts
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def file_server(body: bytes) -> Iterator[ThreadingHTTPServer]:
    """Serve a file under every path; `starts` holds from where on each request got it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as server:
        server.plan, server.starts, server.body, server.etag = [], [], body, True
        server.trickling, server.released = threading.Event(), threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


class Flaky(BaseHTTPRequestHandler):
    """Serves the server's `body`, and misbehaves as its `plan` says: one entry a request, then as it should."""

    def do_GET(self):
        """Answer one request."""
        server = self.server
        act = server.plan.pop(0) if server.plan else "serve"
        etag = server.etag and f'"{hashlib.md5(server.body).hexdigest()}"'
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        other_version = self.headers.get("If-Range", etag) != etag and act != "ignore If-Range"
        start = 0 if act == "ignore range" or other_version else start
        server.starts.append(start)
        if isinstance(act, int) and act >= 400:
            self.send_response(act)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if start >= len(server.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if act == "cut":
            self.wfile.write(server.body[start : start + 300_000])
            self.close_connection = True  # before all of the length that was announced
        elif act == "trickle":
            self.wfile.write(server.body[start : start + 500_000])
            server.trickling.set()
            server.released.wait(30)
        else:
            self.wfile.write(server.body[start:])

    def log_message(self, *args):
        """Say nothing."""
