"""A Hub on this machine: what huggingface_hub's client asks of the real one, over HTTP on loopback, kept in memory.

It has repositories with commits, branches, tags and pull requests; large files through LFS, in one piece or several,
downloaded from another host name as from the real CDN; private repositories; and failures on demand. Xet is switched
off: its protocol is not public, and the client uses LFS without it.

Source: the requests of huggingface_hub 1.0 to 2.4 (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`), and
git-lfs' `docs/api/batch.md`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml


LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".npz", ".model", ".zip")
LARGE_SIZE = 10 * 1024 * 1024  # bytes from which on any file goes through LFS


class HubError(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    content: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git keeps of a large file."""
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return lines.encode()

    @property
    def oid(self) -> str:
        """Git's name of it."""
        content = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict:
        about = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.large:
            about["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return about


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    files: dict[str, Blob]
    parent: str | None
    title: str
    description: str = ""

    @property
    def sha(self) -> str:
        content = [self.parent, self.title, self.description, {path: blob.oid for path, blob in self.files.items()}]
        return hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Repository:
    """Commits, and names for some of them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.put("main", Commit({}, None, "initial commit"))

    def put(self, branch: str, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def sha(self, revision: str) -> str:
        """The commit that a branch, a tag or (the beginning of) a hash stands for."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]


@dataclass
class Failure:
    """What goes wrong with the next requests of a kind; see `LocalHub.fail`."""

    path: re.Pattern
    method: str | None
    times: int
    status: int
    retry_after: int | None
    cut_after: int | None
    reset: bool
    answer_lost: bool


class Cut(Exception):
    """The connection ends here."""


class LocalHub:
    """The server and what it was sent.

    Attributes:
        endpoint: What `HF_ENDPOINT` has to be.
        token: Of the user `me`, who may write to `me/...` and to the organisation `lab/...`.
        repositories: By name.
        requests: `(method, path)` of all requests so far, queries left out.
        waits: Seconds that the client in this process waited before it tried again, see `connect`.
        part_size: Bytes from which on large files are uploaded in parts of this size.
    """

    token = "hf_local"

    def __init__(self):
        self.users = {self.token: {"name": "me", "orgs": ["lab"]}}
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str]] = []
        self.waits: list[float] = []
        self.part_size = 8 * 1024 * 1024
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.block_on_close = False
        port = self.server.server_port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # another host, as the CDN is: the token must not go there
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    # ------------------------------------------------------------------ for tests

    def add(self, repo_id: str, folder: str | os.PathLike, private: bool = False) -> str:
        """Put a folder's files there as a repository's next commit, without a client.

        Returns:
            The commit.
        """
        folder = Path(folder)
        files = {
            path.relative_to(folder).as_posix(): Blob(path.read_bytes(), is_large(path.name, path.stat().st_size))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository(private))
            self.large.update((blob.sha256, blob.content) for blob in files.values() if blob.large)
            return repository.put("main", Commit(files, repository.branches["main"], f"Add {folder.name}"))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        repository = self.repositories[repo_id]
        commit = repository.commits[repository.sha(revision)]
        return {path: blob.content for path, blob in commit.files.items()}

    def history(self, repo_id: str, revision: str = "main") -> list[str]:
        """Commits, the newest first."""
        repository = self.repositories[repo_id]
        shas = [repository.sha(revision)]
        while (parent := repository.commits[shas[-1]].parent) is not None:
            shas.append(parent)
        return shas

    def fail(
        self,
        path: str = "",
        method: str | None = None,
        times: int = 1,
        status: int = 503,
        retry_after: int | None = None,
        cut_after: int | None = None,
        reset: bool = False,
        answer_lost: bool = False,
    ) -> None:
        """Let the next requests fail.

        Args:
            path: Regular expression, searched in the path: `"/commit/"`, `r"/resolve/.*safetensors"`. The bodies of
                large files go to `/lfs/` and come from `/cdn/`.
            method: Only of this method.
            times: How many of them.
            status: What is answered: 429, 500, 503...
            retry_after: Seconds to say in `Retry-After`.
            cut_after: Instead of an answer, close the connection after so many bytes of the request's body, or of the
                answer's where the request has none.
            answer_lost: Do what was asked, then close the connection instead of saying so.
            reset: Close it as a crashed machine does (RST), not as one that shuts down (FIN).
        """
        with self.lock:
            self.failures.append(
                Failure(re.compile(path), method, times, status, retry_after, cut_after, reset, answer_lost)
            )

    def failure(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and failure.method in (None, method) and failure.path.search(path):
                    failure.times -= 1
                    return failure
        return None

    def environment(self, home: str | os.PathLike, **more: str) -> dict[str, str]:
        """Environment variables of a process that takes this for the Hub.

        Args:
            home: Its `HF_HOME`: an empty folder for an empty cache.
            more: Further variables, such as `HF_HUB_OFFLINE="1"`.
        """
        from vlbridge.files import cache_dir

        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": os.fspath(home), "HF_TOKEN": self.token}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        # the embedded parts, where this machine has them, are no part of the Hub
        return {**kept, **hub, **quiet, "VLBRIDGE_CACHE": str(cache_dir()), "OMP_NUM_THREADS": "1", **more}

    def run(self, home: str | os.PathLike, *arguments, **more: str) -> subprocess.CompletedProcess:
        """Run Python with this as its Hub: `hub.run(home, "-m", "vlbridge.cli", "info", "me/bridge")`.

        Args:
            home: As for `environment`.
            arguments: Of the interpreter.
            more: As for `environment`.
        """
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True, text=True, env=self.environment(home, **more), timeout=300,
        )  # fmt: skip

    def connect(self, monkeypatch, home: str | os.PathLike) -> None:
        """Make this the Hub of the client in this process, until `monkeypatch` is undone.

        The client reads most of its environment when it is imported, so its constants are replaced as well. It does not
        sleep between attempts: what it would have waited is in `waits`.

        Args:
            monkeypatch: pytest's.
            home: As for `environment`.
        """
        import huggingface_hub.file_download
        import transformers.dynamic_module_utils
        from huggingface_hub import close_session, constants
        from huggingface_hub.utils import _http

        import vlbridge.files

        environment = self.environment(home)
        for name in set(os.environ) - set(environment):
            monkeypatch.delenv(name)
        for name, value in environment.items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)
        home = Path(home)
        for name, value in {
            "HF_HOME": home,
            "HF_HUB_CACHE": home / "hub",
            "HUGGINGFACE_HUB_CACHE": home / "hub",
            "HF_ASSETS_CACHE": home / "assets",
            "HF_TOKEN_PATH": home / "token",
            "HF_STORED_TOKENS_PATH": home / "stored_tokens",
        }.items():
            monkeypatch.setattr(constants, name, str(value), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
        self.point_at(monkeypatch, self.endpoint)
        clock = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
        for module in (_http, huggingface_hub.file_download, vlbridge.files):
            if hasattr(module, "time"):
                monkeypatch.setattr(module, "time", SimpleNamespace(**{**clock, "sleep": self.waits.append}))
        close_session()  # connections, and proxies that were read from the environment

    def point_at(self, monkeypatch, endpoint: str) -> None:
        import huggingface_hub.hf_api
        import transformers.utils.hub
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)

    @contextmanager
    def offline(self, known: bool = True):
        """The client in this process has no network.

        Args:
            known: It was told (`HF_HUB_OFFLINE`); else it finds out.
        """
        from huggingface_hub import constants

        with pytest.MonkeyPatch.context() as monkeypatch:
            self.point_at(monkeypatch, "http://127.0.0.1:9")  # the discard service: nobody runs it
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", known)
            yield

    # ------------------------------------------------------------------ state, as requests change it

    def repository(self, repo_id: str, user: dict | None) -> Repository:
        repository = self.repositories.get(repo_id)
        if repository is None or repository.private and not may_write(user, repo_id):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def commit(self, repo_id: str, branch: str, lines: list[dict], create_pr: bool) -> tuple[str, int | None]:
        """Apply a commit whole, or not at all.

        Returns:
            Its hash, and the number of its pull request.
        """
        repository = self.repositories[repo_id]
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repository.branches[branch]
        files = dict(repository.commits[head].files)
        header = None
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise HubError(400, f"{value['path']}: {value['oid']} was never uploaded")
                files[value["path"]] = Blob(self.large[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif line["key"] == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {path: blob for path, blob in files.items() if not path.startswith(prefix)}
            else:
                raise HubError(400, f"Unknown operation {line['key']!r}")
        if header is None:
            raise HubError(400, "The commit has no header")
        parent = header.get("parentCommit")
        if parent and not create_pr and not head.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        number = None
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            branch = f"refs/pr/{number}"
        commit = Commit(files, head, header["summary"], header.get("description", ""))
        return repository.put(branch, commit), number


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size >= LARGE_SIZE


def may_write(user: dict | None, repo_id: str) -> bool:
    return user is not None and repo_id.split("/")[0] in (user["name"], *user["orgs"])


def card_data(readme: bytes) -> dict:
    """The metadata at a model card's beginning.

    Raises:
        HubError: It is no valid YAML.
    """
    match = re.match(r"\A---[ \t]*\n(.*?)\n---", readme.decode(), flags=re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
    if not isinstance(data or {}, dict):
        raise HubError(400, "Invalid metadata", errors=[{"message": "metadata must be a mapping"}])
    wrong = [
        {"message": f'"{name}" must be {"a string" if kind is str else "a list"}'}
        for name, kind in (("license", str), ("pipeline_tag", str), ("library_name", str), ("tags", list))
        if not isinstance((data or {}).get(name, kind()), kind)
    ]
    if wrong:
        raise HubError(400, "Invalid metadata", errors=wrong)
    return data or {}


class Handler(BaseHTTPRequestHandler):
    """Routes: `(method, pattern)` to a method that answers."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"
    REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("PUT", rf"/api/models/{REPO}/settings", "settings"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", rf"/api/models/{REPO}/commits/(?P<revision>[^/]+)", "commits"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"/api/models/{REPO}/refs", "refs"),
        ("POST", rf"/api/models/{REPO}/(?P<kind>branch)/(?P<name>[^/]+)", "name"),
        ("POST", rf"/api/models/{REPO}/(?P<kind>tag)/(?P<revision>[^/]+)", "name"),
        ("DELETE", rf"/api/models/{REPO}/(?P<kind>branch|tag)/(?P<name>[^/]+)", "unname"),
        ("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", "lfs_upload"),
        ("POST", r"/lfs/(?P<oid>\w+)/complete", "lfs_complete"),
        ("POST", r"/lfs/(?P<oid>\w+)/verify", "lfs_verify"),
        ("GET", r"/cdn/(?P<oid>\w+)", "cdn"),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    # ------------------------------------------------------------------ plumbing

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(path)))
        failure = self.hub.failure(self.command, unquote(path))
        self.cut_after = None
        try:
            body = self.read_body(None if failure is None else failure.cut_after)
            if failure is not None and failure.answer_lost:
                failure.cut_after = 0
            elif failure is not None and failure.cut_after is None:
                headers = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
                return self.answer(failure.status, {"error": f"{failure.status}, as asked for"}, headers)
            self.cut_after = None if failure is None else failure.cut_after
            self.route(path, body)
        except Cut:
            if failure.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
            self.connection.close()
        except HubError as error:
            headers = {"X-Error-Message": str(error)}
            if error.code:
                headers["X-Error-Code"] = error.code
            if error.code == "EntryNotFound" and "commit" in error.body:
                headers["X-Repo-Commit"] = error.body.pop("commit")
            self.answer(error.status, {"error": str(error), **error.body}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def route(self, path: str, body: bytes) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.users.get(bearer)
        if bearer and self.user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.query = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        for wanted, pattern, name in self.ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, f"on_{name}")(body, **found)
        raise HubError(404, f"No such page: {method} {path}")

    def read_body(self, cut_after: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if cut_after is not None and sum(map(len, chunks)) > cut_after:
                    raise Cut
            self.rfile.readline()
            return b"".join(chunks)
        size = int(self.headers.get("Content-Length") or 0)
        if cut_after is not None and size:
            self.rfile.read(min(size, cut_after))
            raise Cut
        return self.rfile.read(size)

    def answer(self, status: int, body: object = b"", headers: dict | None = None) -> None:
        """Send an answer: bytes as they are, anything else as JSON."""
        headers = dict(headers or {})
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        if self.cut_after == 0:
            raise Cut
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.cut_after])
        if self.cut_after is not None:
            self.wfile.flush()
            time.sleep(0.05)  # or the reset overtakes what was sent
            raise Cut

    def log_message(self, *args) -> None:
        pass

    def writable(self, repo: str) -> Repository:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        repository = self.hub.repository(repo, self.user)
        if not may_write(self.user, repo):
            raise HubError(403, "You don't have the rights to write here")
        return repository

    def state(self, repo: str, revision: str = "main") -> tuple[Repository, str, dict[str, Blob]]:
        repository = self.hub.repository(repo, self.user)
        sha = repository.sha(revision)
        return repository, sha, repository.commits[sha].files

    # ------------------------------------------------------------------ accounts and repositories

    def on_whoami(self, body) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        access = {"accessToken": {"displayName": "local", "role": "write"}}
        orgs = [{"name": name, "type": "org"} for name in self.user["orgs"]]
        self.answer(200, {"type": "user", "name": self.user["name"], "orgs": orgs, "auth": access})

    def on_create(self, body) -> None:
        asked = json.loads(body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        repo = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
        if not may_write(self.user, repo):
            raise HubError(403, f"You don't have the rights to create {repo}")
        url = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        with self.hub.lock:
            if repo in self.hub.repositories:
                raise HubError(409, "You already created this model repo", **url)
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories[repo] = Repository(private)
        self.answer(200, url)

    def on_delete(self, body) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
        self.writable(repo)
        del self.hub.repositories[repo]
        self.answer(200)

    def on_settings(self, body, repo) -> None:
        asked = json.loads(body)
        repository = self.writable(repo)
        repository.private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.answer(200, {"private": repository.private})

    def on_validate_yaml(self, body) -> None:
        card_data(json.loads(body)["content"].encode())
        self.answer(200, {"errors": [], "warnings": []})

    def on_info(self, body, repo, revision="main") -> None:
        repository, sha, files = self.state(repo, revision)
        data = card_data(files["README.md"].content) if "README.md" in files else {}
        siblings = []
        for path, blob in files.items():
            entry = {"rfilename": path}
            if self.query.get("blobs"):
                about = blob.entry(path)
                entry |= {"size": about["size"], "blobId": about["oid"]}
                if "lfs" in about:
                    entry["lfs"] = {**about["lfs"], "sha256": about["lfs"]["oid"]}
            siblings.append(entry)
        self.answer(200, {
            "_id": hashlib.md5(repo.encode()).hexdigest()[:24], "id": repo, "modelId": repo,
            "author": repo.split("/")[0],
            "sha": sha, "private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
            "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z",
            "tags": data.get("tags") or [], "cardData": data, "siblings": siblings,
            **{name: data[name] for name in ("pipeline_tag", "library_name") if name in data},
        })  # fmt: skip

    # ------------------------------------------------------------------ commits and names

    def on_preupload(self, body, repo, revision) -> None:
        self.writable(repo)
        _, _, files = self.state(repo, revision)
        answers = []
        for asked in json.loads(body)["files"]:
            known = files.get(asked["path"])
            large = is_large(asked["path"], asked["size"])
            answers.append({"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                            "oid": None if known is None else known.etag})  # fmt: skip
        self.answer(200, {"files": answers})

    def on_commit(self, body, repo, revision) -> None:
        self.writable(repo)
        lines = [json.loads(line) for line in body.splitlines()]
        with self.hub.lock:
            sha, number = self.hub.commit(repo, revision, lines, bool(self.query.get("create_pr")))
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"}
        if number is not None:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
        self.answer(200, answer)

    def on_commits(self, body, repo, revision) -> None:
        repository, sha, _ = self.state(repo, revision)
        page = []
        while sha is not None:
            commit = repository.commits[sha]
            page.append({"id": sha, "title": commit.title, "message": commit.description, "authors": [{"user": "me"}],
                         "date": "2024-01-01T00:00:00.000Z"})  # fmt: skip
            sha = commit.parent
        self.answer(200, page)

    def on_tree(self, body, repo, revision, path="") -> None:
        _, _, files = self.state(repo, revision)
        prefix = f"{path}/" if path else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries, folders = [], set()
        for name, blob in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            parents = name[len(prefix) :].split("/")[:-1]
            inside = [prefix + "/".join(parents[: depth + 1]) for depth in range(len(parents))]
            for folder in inside if recursive else inside[:1]:
                if folder not in folders:
                    folders.add(folder)
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    entries.append({"type": "directory", "path": folder, "size": 0, "oid": oid})
            if recursive or not parents:
                entries.append(blob.entry(name))
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        self.answer(200, entries)

    def on_paths_info(self, body, repo, revision) -> None:
        _, _, files = self.state(repo, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        self.answer(200, [files[path].entry(path) for path in paths if path in files])

    def on_refs(self, body, repo) -> None:
        repository = self.hub.repository(repo, self.user)

        def listed(names: dict[str, str], kind: str) -> list[dict]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

        pulls = {name: sha for name, sha in repository.branches.items() if name.startswith("refs/pr/")}
        own = {name: sha for name, sha in repository.branches.items() if name not in pulls}
        answer = {"branches": listed(own, "heads"), "tags": listed(repository.tags, "tags"), "converts": []}
        if self.query.get("include_prs"):
            answer["pullRequests"] = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in pulls.items()]
        self.answer(200, answer)

    def on_name(self, body, repo, kind, name=None, revision=None) -> None:
        repository = self.writable(repo)
        asked = json.loads(body or b"{}")
        name = name or asked["tag"]
        names = repository.branches if kind == "branch" else repository.tags
        if name in names:
            raise HubError(409, f"Reference {name} already exists")
        names[name] = repository.sha(revision or asked.get("startingPoint") or "main")
        self.answer(201, {})

    def on_unname(self, body, repo, kind, name) -> None:
        repository = self.writable(repo)
        names = repository.branches if kind == "branch" else repository.tags
        if names.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self.answer(200, {})

    # ------------------------------------------------------------------ large files

    def on_lfs_batch(self, body, repo) -> None:
        self.writable(repo)
        answers = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answers.append(answer := {"oid": oid, "size": size})
            if oid in self.hub.large:
                continue  # without actions: it is here already
            href, step = f"{self.hub.storage}/lfs/{oid}", self.hub.part_size
            upload = {"href": href}
            if size > step:
                count = -(-size // step)
                parts = {f"{number:05d}": f"{href}/{number}" for number in range(1, count + 1)}
                upload = {"href": f"{href}/complete", "header": {"chunk_size": str(step), **parts}}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/{oid}/verify"}}
        self.answer(200, {"transfer": "basic", "objects": answers})

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"{len(content)} bytes that don't hash to {oid}")
        self.hub.large[oid] = content

    def no_token(self) -> None:
        if self.user is not None:
            raise HubError(400, "The token was sent to the storage, which has no business with it")

    def on_lfs_upload(self, body, oid, part=None) -> None:
        self.no_token()
        if part is None:
            self.store(oid, body)
        else:
            self.hub.parts[oid, int(part)] = body
        self.answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def on_lfs_complete(self, body, oid) -> None:
        parts = json.loads(body)["parts"]
        content = [self.hub.parts[oid, part["partNumber"]] for part in parts]
        if any(part["etag"].strip('"') != hashlib.md5(chunk).hexdigest() for part, chunk in zip(parts, content)):
            raise HubError(400, "A part's ETag is not what it was uploaded with")
        self.store(oid, b"".join(content))
        self.answer(200, {})

    def on_lfs_verify(self, body, oid) -> None:
        if len(self.hub.large.get(oid, b"")) != json.loads(body)["size"]:
            raise HubError(404, f"{oid} is not here")
        self.answer(200, {})

    # ------------------------------------------------------------------ downloads

    def on_resolve(self, body, repo, revision, path) -> None:
        _, sha, files = self.state(repo, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit=sha)
        blob = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.sha256}"'}
            headers["Location"] = f"{self.hub.storage}/cdn/{blob.sha256}?name={quote(path)}"
            return self.answer(302, headers=headers)
        self.send_range(blob.content, {**headers, "ETag": f'"{blob.oid}"'})

    def on_cdn(self, body, oid) -> None:
        self.no_token()
        if oid not in self.hub.large:
            raise HubError(404, f"{oid} is not here")
        self.send_range(self.hub.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_range(self, content: bytes, headers: dict) -> None:
        if self.headers.get("If-None-Match") == headers["ETag"]:
            return self.answer(304, headers=headers)
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or match[0] == "bytes=-":
            return self.answer(200, content, headers)
        total = len(content)
        if not match[1]:  # the last so many bytes
            start, stop = max(0, total - int(match[2])), total
        else:
            start, stop = int(match[1]), min(total, int(match[2] or total) + 1)
        if start >= total:
            return self.answer(416, headers={**headers, "Content-Range": f"bytes */{total}"})
        self.answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{total}"})
