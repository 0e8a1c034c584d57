"""A stand-in for the Hugging Face hub: what its client asks when it creates, fills and reads a repo.

Repos and large files live in memory. `refuse` names a path whose upload answers 403, once its bytes are in;
`hang` one whose upload never answers; `intrude` has somebody else commit at the next upload; to a `read_only`
token nothing is written. `requests` is what was asked, `received` the bytes of each upload.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

TOKEN = "hf_a_token_for_this_test"
USER = "tester"
LFS = (".gguf", ".safetensors", "tokenizer.json")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def head(repo: dict[str, Any]) -> str:
    return hashlib.sha1(str(len(repo["commits"])).encode()).hexdigest()


class Hub:
    """The hub's state, and how it misbehaves."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.received: list[tuple[str, int]] = []
        self.refuse = ""
        self.hang = ""
        self.intrude = False
        self.read_only = False
        self.hanging = threading.Event()
        self.url = ""

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo]["files"]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{method} {path}")
        if method == "PUT":
            self._upload(path, body)
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid user token."})
            return
        routes = (
            (r"GET /api/whoami-v2", self._whoami),
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", self._validate),
            (r"GET /api/((?:model|space)s/[^/]+/[^/]+)", self._info),
            (r"GET /api/((?:model|space)s/[^/]+/[^/]+)/tree/main", self._tree),
            (r"POST /api/((?:model|space)s/[^/]+/[^/]+)/preupload/main", self._preupload),
            (r"POST /api/((?:model|space)s/[^/]+/[^/]+)/commit/main", self._commit),
            (r"POST /(.+)\.git/info/lfs/objects/batch", self._batch),
            (r"(?:GET|HEAD) /(.+)/resolve/main/(.+)", self._resolve),
        )
        for pattern, action in routes:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                action(body, *match.groups())
                return
        self._answer(404, {"error": f"the stand-in has no {method} {path}"})

    def _whoami(self, body: bytes) -> None:
        self._answer(200, {"name": USER, "type": "user"})

    def _create(self, body: bytes) -> None:
        if self.hub.read_only:
            self._answer(403, {"error": "your token may not write here"})
            return
        asked = json.loads(body)
        name = f"{asked.get('type') or 'model'}s/{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self._answer(409, {"error": "You already created this repo"})
            return
        files = {".gitattributes": b"*.gguf filter=lfs\n"}
        is_private = asked.get("visibility") == "private"
        sdk = asked.get("sdk")
        if sdk:  # by its front matter the hub knows what a Space runs
            files["README.md"] = f"---\nsdk: {sdk}\n---\n".encode()
        self.hub.repos[name] = {"private": is_private, "sdk": sdk, "files": files, "commits": []}
        self._answer(200, {"url": f"{self.hub.url}/{name.removeprefix('models/')}"})

    def _validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        errors = [] if text.startswith("---\n") else [{"message": "no metadata"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _info(self, body: bytes, repo: str) -> None:
        found = self._repo(repo)
        if found is not None:
            identity = repo.split("/", 1)[1]
            self._answer(200, {"id": identity, "private": found["private"], "sha": head(found)})

    def _tree(self, body: bytes, repo: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        entries = []
        for path, content in found["files"].items():
            entry = {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": git_oid(content),
            }
            if path.endswith(LFS):
                digest = hashlib.sha256(content).hexdigest()
                entry["oid"] = git_oid(digest.encode())
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def _preupload(self, body: bytes, repo: str) -> None:
        found = self._repo(repo)
        if found is not None:
            answer = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": answer})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/upload/{asked['oid']}/{asked['size']}"
                asked["actions"] = {"upload": {"href": href}}
            objects.append(asked)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, path: str, body: bytes) -> None:
        digest = path.split("/")[2]
        self.hub.received.append((digest, len(body)))
        if digest == self.hub.refuse:
            self._answer(403, {"error": "storage quota exceeded"})
            return
        if digest == self.hub.hang:
            self.hub.hanging.set()
            threading.Event().wait(30)
            self.close_connection = True
            return
        if self.hub.intrude:
            self.hub.intrude = False
            for repo in self.hub.repos.values():
                repo["commits"].append("another's")
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.objects[digest] = body
        self._answer(200, {})

    def _commit(self, body: bytes, repo: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        items = [json.loads(line) for line in body.splitlines()]
        parent = items[0]["value"].get("parentCommit")
        if parent not in (None, head(found)):
            error = "A commit has happened since. Please refresh and try again."
            self._answer(412, {"error": error})
            return
        for item in items:
            value = item["value"]
            if item["key"] == "header":
                found["commits"].append(value["summary"])
            elif item["key"] == "file":
                found["files"][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                found["files"][value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del found["files"][value["path"]]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/x", "commitOid": "0" * 40})

    def _resolve(self, body: bytes, repo: str, path: str) -> None:
        found = self._repo(repo if repo.startswith("spaces/") else f"models/{repo}")
        if found is not None:
            content = found["files"][path]
            headers = {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": "0" * 40}
            self._answer(200, content, headers)

    def _repo(self, name: str) -> dict[str, Any] | None:
        found = self.hub.repos.get(name)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
