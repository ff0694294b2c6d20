"""A small model hub on this machine, with the part of the protocol that files need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """What it holds.

    Attributes:
        private: OWNER/NAME -> whether it was made for the owner alone.
        files: OWNER/NAME -> path -> content, of the newest commit.
        fails: an HTTP status to answer every request with, or 0.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.fails = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refused(self) -> bool:
        """Answer what the hub would not do."""
        if self.server.fails:
            self.answer(self.server.fails, {"error": "as the test wants it"})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        else:
            return False
        return True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(n for n in (asked.get("organization"), asked["name"]) if n)
            known = name in self.server.private
            self.server.private.setdefault(name, self.made_private(asked))
            self.answer(409 if known else 200, {"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            self.commit([json.loads(line) for line in body.splitlines()])

    @staticmethod
    def made_private(asked: dict[str, Any]) -> bool:
        return bool(asked.get("private")) or asked.get("visibility") == "private"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        name = self.path.removeprefix("/api/models/").split("/commit/")[0]
        held = self.server.files.setdefault(name, {})
        for line in lines:
            if line["key"] == "file":
                held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"{self.server.address}/{name}/commit/{self.revision(name)}"
        self.answer(200, {"commitUrl": address, "commitOid": self.revision(name), "success": True})

    def revision(self, name: str) -> str:
        """What stands for the commit: 40 digits of what it holds."""
        held = json.dumps({p: c.hex() for p, c in self.server.files[name].items()})
        return hashlib.sha1(held.encode()).hexdigest()

    def do_GET(self) -> None:
        if self.refused():
            return
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.tell("/".join(parts[2:4]), parts[4:])
            return
        name, path = "/".join(parts[:2]), "/".join(parts[4:])
        held = self.server.files.get(name, {})
        if path not in held:
            self.answer(404, {"error": "none"}, X_Error_Code="EntryNotFound")
            return
        tag = hashlib.sha1(held[path]).hexdigest()
        self.answer(200, held[path], ETag=f'"{tag}"', X_Repo_Commit=self.revision(name))

    def do_HEAD(self) -> None:
        self.do_GET()

    def tell(self, name: str, more: list[str]) -> None:
        """What a name holds: as one answer, or as a list of files."""
        held = self.server.files.get(name)
        if held is None:
            self.answer(404, {"error": "none"}, X_Error_Code="RepoNotFound")
        elif more[:1] == ["tree"]:
            self.answer(200, [
                {"type": "file", "path": path, "size": len(content),
                 "oid": hashlib.sha1(content).hexdigest()}
                for path, content in held.items()
            ])  # fmt: skip
        else:
            siblings = [{"rfilename": path} for path in held]
            private = self.server.private[name]
            self.answer(200, {
                "id": name, "sha": self.revision(name), "siblings": siblings, "tags": [],
                "private": private, "downloads": 0, "likes": 0,
            })  # fmt: skip


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that runs meanwhile."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
