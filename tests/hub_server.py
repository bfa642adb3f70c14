"""A stand-in for the hub: repositories in memory behind the HTTP interface that huggingface_hub speaks."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class Hub:
    """``with Hub() as hub``: its address is ``hub.url``, what was pushed ``hub.repositories[name][file]``.

    Commits of files inside the request only; a token is asked for where something is written.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.cards: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(*hub.post(self.path, body, self.headers.get("Authorization")))

            def do_HEAD(self):
                self.answer(*hub.get(self.path))

            def do_GET(self):
                self.answer(*hub.get(self.path))

            def answer(self, status, content, headers=()):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def post(self, path, body, token):
        """Status and content."""
        if path.startswith("/api/validate-yaml"):
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if not token:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = {}
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            wanted = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        name, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if not action or name not in self.repositories:
            return 404, {"error": "Not found"}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = self.commit_of(name)
        return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}

    def get(self, path):
        """Status, content and headers."""
        path = path.partition("?")[0]
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone", "orgs": []}
        if path.startswith("/api/models/"):
            name = next((n for n in self.repositories if path.removeprefix("/api/models/").startswith(n)), None)
            if name is None or "/tree/" in path:
                return 404, {"error": "Not found"}, {"X-Error-Code": "EntryNotFound" if name else "RepoNotFound"}
            siblings = [{"rfilename": file} for file in self.repositories[name]]
            front = self.repositories[name].get("README.md", b"").decode().partition("---\n")[2].partition("\n---")[0]
            about = {"id": name, "modelId": name, "sha": self.commit_of(name), "siblings": siblings, "tags": []}
            return 200, about | {"cardData": yaml.safe_load(front) or {}}
        name, _, rest = path.lstrip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        commit = {"X-Repo-Commit": self.commit_of(name)}
        if file not in self.repositories[name]:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit}
        content = self.repositories[name][file]
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit}

    def commit_of(self, name):
        """A name for the state of a repository."""
        state = sorted((file, hashlib.sha1(content).hexdigest()) for file, content in self.repositories[name].items())
        return hashlib.sha1(repr(state).encode()).hexdigest()
