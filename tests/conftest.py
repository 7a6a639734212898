"""A local stand-in for the network, and folders of their own for what the tests write.

The stand-in is a real server on a local port that speaks the hub's protocol and serves files with ranges. It is set up
before any library reads its settings, so no test can reach the real hub.
"""

import http.server
import json
import os
import re
import tempfile
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: threads of their own would wait for each other
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llmdrop-hub-cache-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(name, None)  # the user's own settings
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
os.environ["LLMDROP_OUTPUT"] = tempfile.mkdtemp(prefix="llmdrop-output-")


class StandIn(http.server.ThreadingHTTPServer):
    """Repositories and plain files, and the faults that tests ask for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.repositories = {}  # "org/name" or "datasets/org/name" -> {commit: {file: bytes}}
        self.branches = {}  # "org/name" -> {branch: commit}
        self.gated = set()  # descriptions are public, files are for those who have a token in `granted`
        self.granted = set()
        self.sizes = {}  # (repository, file) -> bytes that its description states, in place of the true ones
        self.parameters = {}  # repository -> parameters that its description states
        self.files = {}  # path -> bytes, for plain downloads
        self.down = False  # hang up on every request
        self.cut_after = None  # hang up after this many bytes of a plain file
        self.requests = []  # (method, path, Range)
        self.tokens = []  # of the same requests: the token that was sent, or None

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.respond(with_body=False)

    def do_GET(self):
        self.respond(with_body=True)

    def respond(self, with_body):
        server, path = self.server, self.path.split("?")[0]
        server.requests.append((self.command, path, self.headers.get("Range")))
        server.tokens.append(self.token())
        if server.down:
            self.close_connection = True
            self.connection.close()
            return
        if path in server.files:
            self.send(200, server.files[path], with_body, cut=server.cut_after)
            return
        api = re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+?)(?:/(revision|tree|auth-check)(?:/([\w.-]+))?)?/?", path)
        resolve = re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
        if api:
            kind, name, what, revision = api.groups(default="")
            what, revision = what or "revision", revision or "main"
        elif resolve:
            kind, name, revision, file = resolve.groups()
        else:
            return self.error(404, "EntryNotFound")
        name = f"datasets/{name}" if kind in ("datasets", "datasets/") else name
        if name not in server.repositories:
            return self.error(404, "RepoNotFound")
        commits = server.repositories[name]
        branches = {"main": next(reversed(commits), None)} | server.branches.get(name, {})
        commit = branches.get(revision, revision)
        if commit not in commits:
            return self.error(404, "RevisionNotFound")
        files = commits[commit]
        if api and what == "revision":
            return self.send(200, json.dumps(self.description(name, commit)).encode(), with_body)
        if api and what == "auth-check":
            return self.error(403, "GatedRepo") if self.is_kept(name) else self.send(200, b"{}", with_body)
        if api:
            tree = [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in files.items()]
            return self.send(200, json.dumps(tree).encode(), with_body)
        if self.is_kept(name):
            return self.error(403, "GatedRepo")
        if file not in files:
            return self.error(404, "EntryNotFound")
        self.send(200, files[file], with_body, {"X-Repo-Commit": commit, "ETag": f'"{hash(files[file])}"'})

    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def is_kept(self, name):
        """Is a repository gated to whoever asks?"""
        return name in self.server.gated and self.token() not in self.server.granted

    def description(self, name, commit):
        """What the hub tells of a repository; sizes only if they are asked for, as `files_metadata` does."""
        server, files = self.server, self.server.repositories[name][commit]
        siblings = [{"rfilename": file} for file in files]
        if "blobs=true" in self.path.lower():
            for entry in siblings:
                file = entry["rfilename"]
                entry |= {"size": server.sizes.get((name, file), len(files[file])), "blobId": "0" * 40}
        listing = {"id": name, "sha": commit, "siblings": siblings, "gated": "manual" if name in server.gated else False}
        if name in server.parameters:
            listing["safetensors"] = {"parameters": {"BF16": server.parameters[name]}, "total": server.parameters[name]}
        return listing

    def error(self, status, code):
        self.send(status, b"{}", True, {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status, body, with_body, headers=None, cut=None):
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(asked[1])
            status = 206 if start < len(body) else 416
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(rest if cut is None else rest[:cut])
            if cut is not None and cut < len(rest):
                self.close_connection = True


SERVER = StandIn()
os.environ["HF_ENDPOINT"] = SERVER.address

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items):
    """The file that takes longest first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_reproduce.py")


@pytest.fixture
def network():
    """The stand-in, emptied."""
    SERVER.reset()
    return SERVER


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M and its tokenizer, from the package index."""
    from llmdrop_utils import load_model

    return load_model("smollm2-135m", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def tiny_model():
    from llmdrop_utils import load_model

    return load_model("tiny-llama", dtype=torch.float32, device="cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty download cache."""
    from llmdrop_utils.base import files

    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"
