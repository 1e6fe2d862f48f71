"""A stand-in for the Hugging Face hub that serves folders over HTTP, and refuses some."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", SHA)


class Handler(BaseHTTPRequestHandler):
    """`folders` maps `datasets/org/name` and `models/org/name`; `org/gated` wants another token."""

    folders: Mapping[str, Path]
    tokens: set[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer()

    def _answer(self) -> None:
        self.tokens.add(self.headers.get("Authorization", ""))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        if parts[0] not in ("datasets", "models"):
            parts = ["models", *parts]
        kind, org, name, *rest = [*parts, "", ""][: max(len(parts), 3)]
        if name == "gated":
            return self._refuse(403, "GatedRepo", "Access to this repository is restricted.")
        folder = self.folders.get(f"{kind}/{org}/{name}")
        if folder is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        action, revision, path = (*[*rest, "", ""][:2], "/".join(rest[2:]))
        if revision and revision not in REVISIONS:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if not is_api:
            return self._file(folder, path)
        entries = [self._entry(folder, each) for each in sorted(folder.rglob("*"))]
        if action == "tree":
            inside = [e for e in entries if e["path"].startswith(path) and e["path"] != path]
            return self._json(inside)
        if action == "paths-info":
            return self._json([e for e in entries if e["path"] in self._asked_paths()])
        siblings = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
        common = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        return self._json({"id": f"{org}/{name}", "sha": SHA, "siblings": siblings, **common})

    def _asked_paths(self) -> list[str]:
        return parse_qs(self.body)["paths"]

    def _entry(self, folder: Path, file: Path) -> dict[str, Any]:
        path = file.relative_to(folder).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        digest = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": path, "size": file.stat().st_size, "oid": digest}

    def _file(self, folder: Path, path: str) -> None:
        file = folder / path
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


@contextlib.contextmanager
def serve(folders: Mapping[str, Path]) -> Iterator[tuple[str, set[str]]]:
    """Serve folders; gives the address and the `Authorization` headers that have come."""
    tokens: set[str] = set()
    handler = type("FolderHandler", (Handler,), {"folders": folders, "tokens": tokens})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", tokens
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
