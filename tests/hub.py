"""A Hugging Face Hub on this machine, as small as pushing and pulling models needs it: one user, one branch, no Xet."""

import base64
import hashlib
import json
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_dummy"
# Faults: the connection ends; nothing comes, but it does not end; it ends with half of the answer. And none.
NO_ANSWER, STALLED, HALF, FINE = 0, -1, -2, 200


class HubError(Exception):
    """Status, message and, if there is one, the code by which clients choose what to raise."""


def is_large(path: str, size: int, start: bytes) -> bool:
    """Whether a file goes by LFS: weights, what is larger than 1 MB, and what is no text."""
    return size > 0 and (path.endswith(".safetensors") or size > 1_000_000 or b"\0" in start[:512])


def listed(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it; by its `etag` clients know whether they have it already."""
    size, oid = len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    file = {"type": "file", "path": path, "rfilename": path, "size": size, "oid": oid, "blobId": oid, "etag": oid}
    if is_large(path, size, content):
        file["etag"] = oid = hashlib.sha256(content).hexdigest()
        file["lfs"] = {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}
    return file


class Hub(ThreadingHTTPServer):
    """Serves, while it is entered, the models below `folder`: each is the folder `owner/name`, and may be edited there.

    `requests` ("METHOD /path?query") and `validated` (the YAML of model cards) are what has come. `faults` are to come:
    for a text, the statuses (or other faults) that the next requests with this text in them get, each for one of them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url, self.lock = folder, f"http://127.0.0.1:{self.server_port}", threading.RLock()
        self.requests: list[str] = []
        self.validated: list[str] = []
        self.faults: dict[str, list[int]] = {}
        self.blobs: dict[str, bytes] = {}  # what has come by LFS
        self.history: dict[tuple[str, str], dict[str, bytes]] = {}  # of a model and a commit: its files
        self.closed, self.ending = False, threading.Event()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True  # also to connections that are kept alive
        self.ending.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may be killed while they are answered."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs on top of its environment to see this Hub, and no cache but `cache`."""
        off = "HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE HF_HUB_DISABLE_IMPLICIT_TOKEN".split()
        on = [f"HF_HUB_DISABLE_{what}" for what in "XET TELEMETRY PROGRESS_BARS UPDATE_CHECK".split()]
        on += ["DISABLE_SAFETENSORS_CONVERSION"]  # by a service on the Hub
        caches = {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_MODULES_CACHE": str(cache / "modules")}
        values = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**dict.fromkeys(off, "0"), **dict.fromkeys(on, "1"), **caches, **values}

    def path(self, repo: str) -> Path:
        """The folder of a model, which may not be there."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
            raise HubError(400, f"Not the name of a model: {repo}")
        return self.folder / repo

    def files(self, repo: str) -> dict[str, bytes]:
        """All that the folder of a model holds."""
        with self.lock:
            found = sorted(path for path in self.path(repo).rglob("*") if path.is_file())
            return {path.relative_to(self.path(repo)).as_posix(): path.read_bytes() for path in found}

    def read(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """The commit that a revision is, and its files."""
        with self.lock:
            if not self.path(repo).is_dir():
                raise HubError(404, "Repository not found", "RepoNotFound")
            if (repo, revision) in self.history:
                return revision, self.history[repo, revision]
            files = self.files(repo)
            etags = {path: listed(path, content)["etag"] for path, content in files.items()}
            commit = hashlib.sha1(json.dumps(etags).encode()).hexdigest()
            if revision not in ("main", commit):
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return commit, self.history.setdefault((repo, commit), files)

    def write(self, repo: str, lines: list[bytes]) -> str:
        """Does all that the lines of a commit say or, where one of them is wrong, nothing."""
        with self.lock:
            before, old = self.read(repo)
            files = dict(old)
            for key, value in (json.loads(line).values() for line in lines):
                path = value.get("path", "").removesuffix("/")
                if key == "header":
                    if value.get("parentCommit", before) != before:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                elif {"", ".", "..", ".git"} & set(path.split("/")) or re.search(r"[\\:\0]", path):
                    raise HubError(400, f"Not a path in a repository: {path}")
                elif key == "file":
                    files[path] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[path] = self.blobs[value["oid"]]
                elif key == "deletedFile" and path in files:
                    del files[path]
                elif key == "deletedFolder" and path not in files:
                    files = {name: files[name] for name in files if not name.startswith(f"{path}/")}
                else:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            if any(name.startswith(f"{path}/") for path in files for name in files):
                raise HubError(400, "A path is both a file and a folder")
            shutil.rmtree(self.path(repo))
            self.path(repo).mkdir()
            for path, content in files.items():
                (self.path(repo) / path).parent.mkdir(parents=True, exist_ok=True)
                (self.path(repo) / path).write_bytes(content)
            return self.read(repo)[0]


class Handler(BaseHTTPRequestHandler):
    """A connection to a Hub."""

    server: Hub
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def answer(self) -> None:
        """Answers a request, or does what a fault says."""
        hub, request, url = self.server, f"{self.command} {self.path}", urlsplit(self.path)
        size = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size)
        with hub.lock:
            hub.requests.append(request)
            fault = next((left.pop(0) for text, left in hub.faults.items() if left and text in request), None)
        if fault == STALLED:
            hub.ending.wait()
        if fault in (NO_ANSWER, STALLED) or hub.closed or len(self.body) < size:
            self.close_connection = True
            return
        self.status, self.extra = 200, {"Content-Type": "application/json"}
        try:
            if fault not in (None, FINE, HALF):
                raise HubError(fault, "A fault that the test wants")
            answer = self.route(url.query, [self.command, *map(unquote, url.path[1:].split("/"))])
        except (HubError, KeyError, ValueError) as error:
            self.status, message, *code = error.args if isinstance(error, HubError) else (400, repr(error))
            self.extra |= {"X-Error-Message": json.dumps(message)[1:-1], "X-Error-Code": "".join(code)}
            answer = {"error": message}
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.status == 200:  # what a client lacks that was cut off
            self.status, self.extra["Content-Range"] = 206, f"bytes {asked[1]}-{len(body) - 1}/{len(body)}"
            body = body[int(asked[1]) :]
        self.send_response(self.status)
        for name, value in {**self.extra, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault == HALF else body)
        self.close_connection |= fault == HALF

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Tests have `Hub.requests`."""

    def route(self, query: str, request: list[str]) -> Any:
        """The answer to a method and the pieces of a path."""
        hub, user = self.server, self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not user and (request[-1] == "whoami-v2" or (self.command == "POST" and request[-1] != "validate-yaml")):
            raise HubError(401, "Invalid username or password.")
        match request:
            case ["GET", "api", "whoami-v2"]:
                return {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            case ["POST", "api", "validate-yaml"]:
                return self.validate(json.loads(self.body)["content"])
            case ["POST", "api", "repos", "create"]:
                asked = json.loads(self.body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                with hub.lock:
                    self.status = 409 if hub.path(repo).exists() else 200
                    hub.path(repo).mkdir(parents=True, exist_ok=True)
                return {"url": f"{hub.url}/{repo}", "name": repo, "id": repo}
            case ["GET", "api", "models", owner, name] | ["GET", "api", "models", owner, name, "revision", _]:
                commit, files = hub.read(f"{owner}/{name}", *request[6:])
                siblings = [listed(*file) for file in files.items()]
                return {"id": f"{owner}/{name}", "sha": commit, "private": False, "tags": [], "siblings": siblings}
            case ["GET", "api", "models", owner, name, "tree", revision, *folders]:
                files, above = hub.read(f"{owner}/{name}", revision)[1], "".join(f"{folder}/" for folder in folders)
                found = [listed(*file) for file in files.items() if file[0].startswith(above)]
                if above and not found:
                    raise HubError(404, f"No folder {above}", "EntryNotFound")
                deep = re.search("recursive=true", query, re.IGNORECASE)
                return [file for file in found if deep or "/" not in file["path"].removeprefix(above)]
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                files, asked = hub.read(f"{owner}/{name}", revision)[1], json.loads(self.body)
                for file in asked["files"]:
                    large = is_large(file["path"], file["size"], base64.b64decode(file.pop("sample")))
                    known = listed(file["path"], files[file["path"]])["etag"] if file["path"] in files else None
                    file.update(uploadMode="lfs" if large else "regular", shouldIgnore=False, oid=known)
                return asked
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                hub.read(f"{owner}/{name.removesuffix('.git')}")
                asked = json.loads(self.body)
                for item in asked["objects"]:
                    if item["oid"] not in hub.blobs:
                        item["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
                return {"transfer": "basic", "objects": asked["objects"]}
            case ["PUT", "lfs", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise HubError(400, f"This content is not {oid}")
                hub.blobs[oid] = self.body
                return {}
            case ["POST", "api", "models", owner, name, "commit", revision]:
                if revision != "main" or "create_pr" in query:
                    raise HubError(400, "This Hub has one branch and no pull requests")
                commit = hub.write(f"{owner}/{name}", self.body.splitlines())
                return {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{owner}/{name}/commit/{commit}"}
            case ["GET" | "HEAD", owner, name, "resolve", revision, *pieces]:
                self.extra["X-Repo-Commit"], files = hub.read(f"{owner}/{name}", revision)
                if (path := "/".join(pieces)) not in files:
                    raise HubError(404, f"No file {path}", "EntryNotFound")
                self.extra |= {"ETag": f'"{listed(path, files[path])["etag"]}"', "Content-Type": "binary/octet-stream"}
                return files[path]
        raise HubError(404, "Not a repository, nor an endpoint of this Hub", "RepoNotFound")

    def validate(self, content: str) -> Any:
        """What is wrong with the YAML between the lines of dashes at the start of a card."""
        card = re.match(r"\s*---\s*\n(.*?)^---\s*$", content.replace("\r", ""), re.DOTALL | re.MULTILINE)
        self.server.validated += [card[1]] if card else []
        try:
            errors = [] if not card or isinstance(yaml.safe_load(card[1]), dict) else ["The metadata is not a mapping"]
        except (yaml.YAMLError, ValueError) as error:
            errors = [str(error)]
        self.status = 400 if errors else 200
        return {"errors": [{"message": error} for error in errors], "warnings": []}
