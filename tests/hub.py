"""A hub of models on loopback, for the real client. It keeps repositories in memory.

It answers the few requests with which huggingface_hub makes a repository, commits to it and
downloads from it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_token_of_the_tests"
USER = "tester"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
TASKS = {"text-generation", "text-classification", "fill-mask"}  # some of the hub's


class Stored(NamedTuple):
    """A file of a commit."""

    is_lfs: bool
    oid: str  # of git, or the sha256 of LFS
    size: int


class Repo:
    """Commits by number; what a branch is called is one of them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, Stored]] = {}
        self.branches: dict[str, str] = {}

    def commit(self, branch: str, files: dict[str, Stored]) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class Refused(Exception):
    """An answer that is an error: status, error code of the hub, text."""


class Hub:
    """What a hub has stored, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # by git's oid or the sha256
        self.requests: list[str] = []
        self.failing: str = ""  # requests that begin so are answered with 503
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a revision."""
        stored = self.tree(repo, revision)
        return {name: self.blobs[file.oid] for name, file in stored.items()}

    def tree(self, repo: str, revision: str) -> dict[str, Stored]:
        found = self.repos[repo]
        return found.commits[found.branches.get(revision, revision)]

    def put(self, content: bytes, is_lfs: bool) -> Stored:
        head = b"" if is_lfs else f"blob {len(content)}\0".encode()
        digest = hashlib.sha256 if is_lfs else hashlib.sha1
        oid = digest(head + content).hexdigest()
        self.blobs[oid] = content
        return Stored(is_lfs, oid, len(content))

    def count(self, prefix: str) -> int:
        return sum(request.startswith(prefix) for request in self.requests)

    # --- the answers: (status, content)

    def create(self, asked: dict[str, Any]) -> Any:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{name}"}
        if name in self.repos:
            raise Refused(409, "", json.dumps({"error": "it exists"} | url))
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repos[name] = Repo(bool(private))
        attributes = self.put(ATTRIBUTES, is_lfs=False)
        self.repos[name].commit("main", {".gitattributes": attributes})
        return url

    def info(self, name: str, revision: str = "main") -> Any:
        repo = self.repos[name]
        if revision not in repo.branches and revision not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha = repo.branches.get(revision, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def list_tree(self, name: str, revision: str) -> Any:
        listed = []
        for path, file in self.tree(name, revision).items():
            entry: dict[str, Any] = {
                "type": "file",
                "path": path,
                "size": file.size,
                "oid": file.oid,
            }
            if file.is_lfs:
                entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 130}
            listed.append(entry)
        return listed

    def branch(self, name: str, branch: str, _: dict[str, Any]) -> Any:
        repo = self.repos[name]
        if branch in repo.branches:
            raise Refused(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def preupload(self, name: str, revision: str, asked: dict[str, Any]) -> Any:
        there = self.tree(name, revision)
        answer = []
        for file in asked["files"]:
            is_lfs = file["path"].endswith(".safetensors")
            oid = there[file["path"]].oid if file["path"] in there else None
            mode = "lfs" if is_lfs else "regular"
            answer.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        return {"files": answer}

    def batch(self, name: str, asked: dict[str, Any]) -> Any:
        objects = []
        for file in asked["objects"]:
            entry = dict(file)
            if file["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{file['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> Any:
        repo = self.repos[name]
        files = dict(self.tree(name, revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.put(base64.b64decode(value["content"]), is_lfs=False)
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.blobs, "it was not uploaded"
                files[value["path"]] = Stored(True, value["oid"], len(self.blobs[value["oid"]]))
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files)
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid}

    def validate(self, asked: dict[str, Any]) -> Any:
        """What the hub refuses in a card, as far as its documentation says."""
        errors = faults_of_card(asked["content"])
        if errors:
            raise Refused(400, "", json.dumps({"errors": [{"message": one} for one in errors]}))
        return {"errors": [], "warnings": []}


def faults_of_card(content: str) -> list[str]:
    """What is wrong with the metadata of a card."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not match:
        return ["empty or missing yaml metadata"]
    head = yaml.safe_load(match[1])
    wrong = []
    if head.get("pipeline_tag") not in TASKS:
        wrong.append('"pipeline_tag" must be one of the tasks')
    for field in ("tags", "datasets"):
        if not all(isinstance(one, str) for one in head.get(field, [])):
            wrong.append(f'"{field}" must be texts')
    for model in head.get("model-index", []):
        if not model.get("name"):
            wrong.append('"model-index[0].name" is required')
        for result in model["results"]:
            if not result["task"].get("type"):
                wrong.append('"task.type" is required')
            if not {"type", "name"} <= result["dataset"].keys():
                wrong.append('"dataset" must have type and name')
            for metric in result["metrics"]:
                if "type" not in metric or not isinstance(metric.get("value"), (int, float)):
                    wrong.append('"metrics" must have type and value')
    return wrong


class _Handler(BaseHTTPRequestHandler):
    """From a request to one of the hub's answers."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    MODEL = r"/api/models/(?P<name>[\w.-]+/[\w.-]+)"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.failing and self.hub.requests[-1].startswith(self.hub.failing):
                raise Refused(503, "", "try again")
            self.route(path, body)
        except Refused as error:
            status, code, text = error.args
            content = text if text.startswith("{") else json.dumps({"error": text})
            self.reply(status, content.encode(), {"X-Error-Code": code} if code else {})
        except KeyError as error:
            self.reply(404, b'{"error": "not found"}', {"X-Error-Code": "EntryNotFound"})
            assert error

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        self.refuse_strangers(path)
        if path == "/api/repos/create":
            return self.send(hub.create(json.loads(body)))
        if path == "/api/agent-harnesses":  # of which the client may say one in its user agent
            return self.reply(404, b"")
        if path == "/api/validate-yaml":
            return self.send(hub.validate(json.loads(body)))
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            hub.put(body, is_lfs=True)
            return self.reply(200, b"")
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self.send(hub.batch(match[1], json.loads(body)))
        if match := re.fullmatch(self.MODEL + r"/(branch|preupload|commit)/(.+)", path):
            name, what, revision = match.groups()
            if what == "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                return self.send(hub.commit(name, revision, lines))
            return self.send(getattr(hub, what)(name, revision, json.loads(body or b"{}")))
        if match := re.fullmatch(self.MODEL + r"(?:/revision/(.+))?", path):
            return self.send(hub.info(match[1], match[2] or "main"))
        if match := re.fullmatch(self.MODEL + r"/tree/(.+)", path):
            return self.send(hub.list_tree(match[1], match[2]))
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/cdn/(\w+)", path):
            return self.reply(200, hub.blobs[match[1]], {"ETag": f'"{match[1]}"'})
        raise AssertionError(f"the hub of the tests knows no {self.command} {path}")

    def refuse_strangers(self, path: str) -> None:
        """What is private is not there for those without the token; nobody else may write."""
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith(("/lfs/", "/cdn/")):
            return  # signed URLs, on the real hub
        if self.command not in ("GET", "HEAD") and not is_known:
            raise Refused(401, "", "Invalid username or password.")
        match = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(/|$)", path)
        name = match[1] if match else ""
        if name.startswith("api/"):
            return
        if name and (name not in self.hub.repos or (self.hub.repos[name].private and not is_known)):
            raise Refused(401, "RepoNotFound", "Repository not found")

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.hub.info(name, revision)["sha"]
        file = self.hub.tree(name, commit)[path]
        head = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if not file.is_lfs:
            return self.reply(200, self.hub.blobs[file.oid], head)
        head["X-Linked-Etag"] = f'"{file.oid}"'
        head["X-Linked-Size"] = str(file.size)
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")  # as the real one's files
        head["Location"] = f"{elsewhere}/cdn/{file.oid}"
        self.reply(302, b"", head)

    def send(self, content: Any) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes, head: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (head or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """What a process needs to know this hub."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def use_here(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process know the hub: the client read its environment when it was imported."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
