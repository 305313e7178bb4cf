"""A Hugging Face Hub for tests: commits and files of models and data sets, gated ones for a token alone; counts every request.

In a test:    with FakeHub({"models/org/name": Repository(commit)}) as hub: …  HF_ENDPOINT=hub.url
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_granted"


@dataclass
class Repository:
    """What the Hub has under a name."""

    commit: str
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # files of which the Hub names the sha256
    gated: bool = False
    any_revision: bool = False  # answers for every commit


class FakeHub:
    """A server in a thread."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories  # "models/<id>" or "datasets/<id>"
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.requests.append(path)
                api, name, rest = hub.split(path)
                repository = hub.repositories.get(name)
                if repository is None:
                    self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
                elif repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.send(403, b"", {"X-Error-Code": "GatedRepo"})
                elif rest and rest[1] not in (repository.commit, "main") and not repository.any_revision:
                    self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                elif api:
                    self.send(200, json.dumps(hub.info(name, repository, rest[1] if rest else repository.commit)).encode())
                elif (file := "/".join(rest[2:])) in repository.files:
                    self.send(200, repository.files[file])
                else:
                    self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

            def send(self, status: int, body: bytes, headers: dict | None = None) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @staticmethod
    def split(path: str) -> tuple[bool, str, list[str]]:
        """Return whether a path is one of the API, the repository's key, and what follows: revision/<r> or resolve/<r>/<file>."""
        words = path.split("/")
        api = words[0] == "api"
        words = words[api:]
        return api, "/".join(words[:3]), words[3:]

    @staticmethod
    def info(name: str, repository: Repository, commit: str) -> dict:
        """Return what the Hub says of a repository at a commit, with its files' metadata."""
        siblings = []
        for file, body in repository.files.items():
            lfs = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
            siblings.append({"rfilename": file, "size": len(body), "blobId": "0" * 40} | ({"lfs": lfs} if file in repository.large else {}))
        return {"id": name.partition("/")[2], "sha": commit, "siblings": siblings, "tags": []}

    @property
    def url(self) -> str:
        """Return the server's address."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
