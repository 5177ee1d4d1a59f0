"""A Hub on loopback: the part of the Hub's HTTP API that huggingface_hub uses to upload and to download models.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"] = hub.url     # before huggingface_hub is imported

Repositories are kept in memory, with commits and branches. Large files are sent as Git LFS objects ("basic" transfer)
by clients with HF_HUB_DISABLE_XET=1. With a folder for `xet` they go the way that the client takes by default: its
library hf_xet, given an address `local://FOLDER`, keeps there what it would send to the Hub's store of chunks. Errors
have the status and headers of the real Hub's. `break_upload` and `break_commit` say what goes wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_write", "hf_read", "hf_other"
LARGE = 10 * 2**20  # bytes from which a text is an LFS file


@dataclass(frozen=True)
class Blob:
    """A file.

    content: empty where hf_xet keeps it.
    oid: what the Hub gives as its ETag: git's SHA-1 of a regular file, SHA-256 of a large one.
    xet: the hash by which hf_xet knows it.
    """

    content: bytes
    oid: str
    size: int
    lfs: bool = False
    xet: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> Blob:
        return cls(content, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content))


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A model repository: its commits, oldest first, and where its branches stand."""

    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.find(revision).files.items()}

    def titles(self) -> list[str]:
        return [commit.title for commit in self.commits]

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        oid = hashlib.sha1(f"{self.id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        self.branches[branch] = oid
        return self.commits[-1]


def find_xet_hash(store: Path, sha256: str) -> str | None:
    """The hash by which hf_xet knows a file that it keeps in `store`, from its shards: tables of files in rows of 48
    bytes. A file has a row with its hash, flags and a count, that many rows of chunks, as many again with the first
    flag, and with the second a row with its SHA-256. Hashes are four 64-bit numbers, the lowest byte first.
    """
    for path in store.glob("xet/xorbs/shards/*.mdb"):
        shard, at = path.read_bytes(), 48
        while shard[at : at + 32] != b"\xff" * 32:
            flags, rows = struct.unpack_from("<II", shard, at + 32)
            last = at + 48 * (rows * (2 if flags >> 31 else 1) + (flags >> 30 & 1))
            if flags >> 30 & 1 and _hexadecimal(shard[last : last + 32]) == sha256:
                return _hexadecimal(shard[at : at + 32])
            at = last + 48
    return None


def _hexadecimal(numbers: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", numbers))


class HubServer:
    """The server and all that it holds.

    Attributes:
        repos: by their id.
        tokens: access token → its user and "write" or "read".
        uploads: SHA-256 of every LFS file whose content arrived, in order.
        requests: method and path of every request.
        upload_began: set when the upload that `break_upload` names has begun.
    """

    def __init__(self, xet: Path | None = None) -> None:
        self.xet = xet
        self.repos: dict[str, Repo] = {}
        self.tokens = {WRITE_TOKEN: ("user", "write"), READ_TOKEN: ("user", "read"), OTHER_TOKEN: ("other", "write")}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.upload_began = threading.Event()
        self._broken_upload: tuple[int, str] | None = None
        self._broken_commits = 0
        self._uploads_begun = 0
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def break_upload(self, number: int, how: str) -> None:
        """What happens to an LFS upload, counted from 1 from now on.

        Args:
            how: "cut": the connection ends in the middle, once. "refuse": it is answered by the error 400 that a store
                gives for a transfer that stalled, which the client does not try again. "stall": it never ends.
        """
        with self.lock:
            self._uploads_begun, self._broken_upload = 0, (number, how)
            self.upload_began.clear()

    def break_commit(self, times: int = 1) -> None:
        """Cut the connection of the next commits before they are made."""
        self._broken_commits = times

    def next_upload_fault(self) -> str | None:
        with self.lock:
            self._uploads_begun += 1
            if self._broken_upload is None or self._uploads_begun != self._broken_upload[0]:
                return None
            how, self._broken_upload = self._broken_upload[1], None
            self.upload_began.set()
            return how

    def next_commit_is_broken(self) -> bool:
        with self.lock:
            self._broken_commits -= 1
            return self._broken_commits >= 0


class HubError(Exception):
    """An answer with an error's status, and the code and message that the Hub gives in headers."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body or {"error": message}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def _answer(self, handle) -> None:
        self.path = unquote(urlsplit(self.path).path) if "%2F" not in self.path else urlsplit(self.path).path
        self.parts = [unquote(part) for part in self.path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
        try:
            handle()
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self._read_body()
            self._json(error.body, error.status, headers)

    # --------------------------------------------------------------------------------------------------- who and what

    def _user(self) -> tuple[str | None, str]:
        """Who asks, and whether he may write; nobody without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None, "read"
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        user, role = self._user()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and (role != "write" or user != name.split("/")[0]):
            raise HubError(403, f"You don't have the rights to write to {name}")
        return repo

    @staticmethod
    def _commit(repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ------------------------------------------------------------------------------------------------------- requests

    def _get(self) -> None:
        match self.parts:
            case ["api", "whoami-v2"]:
                user, role = self._user()
                if user is None:
                    raise HubError(401, "Invalid username or password.")
                token = {"displayName": "test", "role": role}
                auth = {"type": "access_token", "accessToken": token}
                self._json({"type": "user", "name": user, "orgs": [], "auth": auth})
            case ["api", "models", owner, name]:
                self._info(self._repo(f"{owner}/{name}"), "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._info(self._repo(f"{owner}/{name}"), revision)
            case ["api", "models", owner, name, "refs"]:
                repo = self._repo(f"{owner}/{name}")
                branches = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
                    for branch, oid in repo.branches.items()
                ]
                self._json({"branches": branches, "tags": [], "converts": []})
            case ["api", "models", owner, name, "tree", revision, *folder]:
                self._tree(self._repo(f"{owner}/{name}"), revision, "/".join(folder))
            case ["api", "models", owner, name, "xet-write-token" | "xet-read-token" as kind, *_]:
                self._repo(f"{owner}/{name}", write=kind == "xet-write-token")
                self._give_xet_access()
            case ["cdn", oid]:
                self._content(self.hub.objects[oid], {"ETag": f'"{oid}"'})
            case [owner, name, "resolve", revision, *path]:
                self._resolve(self._repo(f"{owner}/{name}"), revision, "/".join(path))
            case _:
                raise HubError(404, f"Sorry, we can't find {self.path}")

    def _post(self) -> None:
        match self.parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(self._read_body()))
            case ["api", "validate-yaml"]:
                self._validate(json.loads(self._read_body())["content"])
            case ["api", "models", owner, name, "preupload", revision]:
                self._preupload(self._repo(f"{owner}/{name}", write=True), revision, json.loads(self._read_body()))
            case ["api", "models", owner, name, "commit", revision]:
                self._make_commit(self._repo(f"{owner}/{name}", write=True), revision, self._read_body())
            case ["api", "models", owner, name, "branch", branch]:
                self._branch(self._repo(f"{owner}/{name}", write=True), branch, json.loads(self._read_body() or b"{}"))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._repo(f"{owner}/{name.removesuffix('.git')}", write=True)
                wanted = json.loads(self._read_body())["objects"]
                self._json({"transfer": "basic", "objects": list(map(self._lfs, wanted))})
            case ["lfs", "verify"]:
                given = json.loads(self._read_body())
                if len(self.hub.objects.get(given["oid"], b"")) != given["size"]:
                    raise HubError(404, "The object has not arrived")
                self._json({})
            case _:
                raise HubError(404, f"Sorry, we can't find {self.path}")

    def _put(self) -> None:
        """An LFS file; the store knows no users, as its addresses are signed."""
        fault = self.hub.next_upload_fault()
        if fault == "cut":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self._hang_up()
        if fault == "stall":
            self.rfile.read(1)
            threading.Event().wait(60)
            return self._hang_up()
        content = self._read_body()
        if fault == "refuse":
            raise HubError(400, "RequestTimeout")
        oid = self.parts[-1]
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "BadDigest")
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.uploads.append(oid)
        self._json({})

    # -------------------------------------------------------------------------------------------------------- uploads

    def _create(self, given: dict) -> None:
        user, role = self._user()
        owner = given.get("organization") or user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or owner != user:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{given['name']}"
        private = bool(given.get("private") or given.get("visibility") == "private")
        with self.hub.lock:
            exists = name in self.hub.repos
            if not exists:
                repo = self.hub.repos[name] = Repo(name, private)
                repo.add("main", "initial commit", {".gitattributes": Blob.regular(b"*.safetensors filter=lfs\n")})
        url = f"{self.hub.url}/{name}"
        if exists:
            message = "You already created this model repo"
            raise HubError(409, message, body={"error": message, "url": url})
        self._json({"url": url, "name": name, "id": name})

    def _give_xet_access(self) -> None:
        if self.hub.xet is None:
            raise HubError(404, "This Hub has no store of chunks; set HF_HUB_DISABLE_XET=1")
        url, until = f"local://{self.hub.xet}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
        self._json({"casUrl": url, "exp": until, "accessToken": "xet"}, headers=headers)

    def _validate(self, content: str) -> None:
        block = content.split("---\n")[1] if content.startswith("---\n") else ""
        try:
            yaml.safe_load(block)
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid YAML", body={"errors": [{"message": str(error)}], "warnings": []}) from error
        self._json({"errors": [], "warnings": [] if block else [{"message": "empty or missing yaml metadata"}]})

    def _preupload(self, repo: Repo, revision: str, given: dict) -> None:
        known = self._commit(repo, revision).files
        answers = []
        for file in given["files"]:
            sample = base64.b64decode(file["sample"])
            lfs = file["path"].endswith(".safetensors") or b"\0" in sample or file["size"] > LARGE
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if file["path"] in known:
                answers[-1]["oid"] = known[file["path"]].oid
        self._json({"files": answers})

    def _lfs(self, wanted: dict) -> dict:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.hub.objects:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
        return answer

    def _make_commit(self, repo: Repo, branch: str, body: bytes) -> None:
        if self.hub.next_commit_is_broken():
            return self._hang_up()
        parent = self._commit(repo, branch)
        files, title = dict(parent.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", parent.oid) != parent.oid:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                files[value["path"]] = self._large(value)
            elif item["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        with self.hub.lock:
            commit = repo.add(branch, title, files)
        url = f"{self.hub.url}/{repo.id}/commit/{commit.oid}"
        self._json({"success": True, "commitUrl": url, "commitOid": commit.oid, "hookOutput": ""})

    def _large(self, given: dict) -> Blob:
        oid, size = given["oid"], given["size"]
        if oid in self.hub.objects:
            return Blob(self.hub.objects[oid], oid, size, lfs=True)
        found = None if self.hub.xet is None else find_xet_hash(self.hub.xet, oid)
        if found is None:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {given['path']}")
        return Blob(b"", oid, size, lfs=True, xet=found)

    def _branch(self, repo: Repo, branch: str, given: dict) -> None:
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = self._commit(repo, given.get("startingPoint", "main")).oid
        self._json({})

    # ------------------------------------------------------------------------------------------------------ downloads

    def _info(self, repo: Repo, revision: str) -> None:
        commit = self._commit(repo, revision)
        files = [{"rfilename": path} for path in commit.files]
        self._json({"id": repo.id, "modelId": repo.id, "sha": commit.oid, "private": repo.private, "siblings": files,
                    "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        commit, prefix = self._commit(repo, revision), f"{folder}/" if folder else ""
        entries = []
        for path, blob in commit.files.items():
            if not path.startswith(prefix):
                continue
            entries.append({"type": "file", "path": path, "size": blob.size, "oid": blob.oid})
            if blob.lfs:
                entries[-1]["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 134}
            if blob.xet is not None:
                entries[-1]["xetHash"] = blob.xet
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        self._json(entries)

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if not blob.lfs:
            return self._content(blob.content, headers | {"ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.oid}"'}
        if blob.xet is not None:
            route = f"{self.hub.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": route}
        # Another host than the Hub's, as in reality.
        self._send(302, b"", headers | {"Location": f"http://localhost:{self.hub.port}/cdn/{blob.oid}"})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            return self._send(200, content, headers | {"Accept-Ranges": "bytes"})
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self._send(206, part, headers | {"Accept-Ranges": "bytes", "Content-Range": span})

    # ----------------------------------------------------------------------------------------------------------- HTTP

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]  # a second reading finds nothing left
        return body

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
