"""A Hub on loopback: the part of the Hub's HTTP API that huggingface_hub uses to upload and to download models.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"] = hub.url     # before huggingface_hub is imported

Repositories are kept in memory, with commits and branches. Clients with HF_HUB_DISABLE_XET=1 send large files as Git
LFS objects ("basic" transfer), where `break_upload` and `break_commit` say what goes wrong. With a folder for `xet`
files go the way that the client takes by default: its library hf_xet, given an address `local://FOLDER`, keeps there
what it would send to the Hub's store of chunks. Errors have the status and headers of the real Hub's.
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

WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_write", "hf_read", "hf_other"
TOKENS = {WRITE_TOKEN: ("user", "write"), READ_TOKEN: ("user", "read"), OTHER_TOKEN: ("other", "write")}
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

    def find(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

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
        uploads: SHA-256 of every LFS file whose content arrived, in order.
        requests: method and path of every request.
        upload_began: set when the upload that `break_upload` names has begun.
    """

    def __init__(self, xet: Path | None = None) -> None:
        self.xet = xet
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.upload_began = threading.Event()
        self.lock = threading.RLock()
        self._uploads_left, self._fault = 0, ""
        self._broken_commits = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

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
        self._uploads_left, self._fault = number, how

    def break_commit(self) -> None:
        """Cut the connection of the next commit before it is made."""
        self._broken_commits = 1

    def next_upload_fault(self) -> str | None:
        with self.lock:
            self._uploads_left -= 1
            if self._uploads_left != 0:
                return None
            self.upload_began.set()
            return self._fault

    def next_commit_is_broken(self) -> bool:
        with self.lock:
            self._broken_commits -= 1
            return self._broken_commits >= 0


class HubError(Exception):
    """An answer with an error's status, and the code and message that the Hub gives in headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        try:
            self._route([unquote(part) for part in path.strip("/").split("/")])
        except HubError as error:
            self._read_body()
            self._json(error.body, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _route(self, parts: list[str]) -> None:
        match ["GET" if self.command == "HEAD" else self.command, *parts]:
            case ["GET", "api", "whoami-v2"]:
                user, role = self._user()
                token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
                self._json({"type": "user", "name": user, "orgs": [], "auth": token})
            case ["GET", "api", "models", owner, name]:
                self._info(self._repo(owner, name), "main")
            case ["GET", "api", "models", owner, name, "revision", revision]:
                self._info(self._repo(owner, name), revision)
            case ["GET", "api", "models", owner, name, "tree", revision, *folder]:
                self._tree(self._repo(owner, name).find(revision), "/".join([*folder, ""]))
            case ["GET", "api", "models", owner, name, "xet-write-token" | "xet-read-token" as kind, *_]:
                self._repo(owner, name, write=kind == "xet-write-token")
                self._give_xet_access()
            case ["GET", owner, name, "resolve", revision, *path]:
                self._resolve(self._repo(owner, name), revision, "/".join(path))
            case ["POST", "api", "repos", "create"]:
                self._create(json.loads(self._read_body()))
            case ["POST", "api", "validate-yaml"]:
                self._read_body()
                self._json({"errors": [], "warnings": []})
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                self._preupload(self._repo(owner, name, write=True).find(revision), json.loads(self._read_body()))
            case ["POST", "api", "models", owner, name, "commit", revision]:
                self._make_commit(self._repo(owner, name, write=True), revision, self._read_body())
            case ["POST", "api", "models", owner, name, "branch", branch]:
                self._branch(self._repo(owner, name, write=True), branch, json.loads(self._read_body() or b"{}"))
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                self._repo(owner, name.removesuffix(".git"), write=True)
                wanted = json.loads(self._read_body())["objects"]
                self._json({"transfer": "basic", "objects": list(map(self._lfs, wanted))})
            case ["PUT", "lfs", oid]:
                self._put(oid)
            case _:
                raise HubError(404, f"Sorry, we can't find {self.path}")

    # --------------------------------------------------------------------------------------------------- who and what

    def _user(self) -> tuple[str, str]:
        """Who asks, and whether he may write."""
        header = self.headers.get("Authorization", "")
        user = TOKENS.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header" if header else "Invalid username")
        return user

    def _repo(self, owner: str, name: str, *, write: bool = False) -> Repo:
        user, role = self._user()
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and user != owner):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and (role != "write" or user != owner):
            raise HubError(403, f"You don't have the rights to write to {repo.id}")
        return repo

    def _create(self, given: dict) -> None:
        user, role = self._user()
        owner = given.get("organization") or user
        if role != "write" or owner != user:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{given['name']}"
        url = f"{self.hub.url}/{name}"
        with self.hub.lock:
            if name in self.hub.repos:
                raise HubError(409, "You already created this model repo", url=url)
            private = bool(given.get("private") or given.get("visibility") == "private")
            repo = self.hub.repos[name] = Repo(name, private)
            repo.add("main", "initial commit", {".gitattributes": Blob.regular(b"*.safetensors filter=lfs\n")})
        self._json({"url": url, "name": name, "id": name})

    def _branch(self, repo: Repo, branch: str, given: dict) -> None:
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.find(given.get("startingPoint", "main")).oid
        self._json({})

    # -------------------------------------------------------------------------------------------------------- uploads

    def _give_xet_access(self) -> None:
        if self.hub.xet is None:
            raise HubError(404, "This Hub has no store of chunks; set HF_HUB_DISABLE_XET=1")
        url, until = f"local://{self.hub.xet}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
        self._json({"casUrl": url, "exp": until, "accessToken": "xet"}, headers=headers)

    def _preupload(self, known: Commit, given: dict) -> None:
        answers = []
        for file in given["files"]:
            lfs = file["path"].endswith(".safetensors") or b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if lfs or file["size"] > LARGE else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in known.files:
                answers[-1]["oid"] = known.files[file["path"]].oid
        self._json({"files": answers})

    def _lfs(self, wanted: dict) -> dict:
        upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}
        actions = {} if wanted["oid"] in self.hub.objects else {"actions": {"upload": upload}}
        return {"oid": wanted["oid"], "size": wanted["size"]} | actions

    def _put(self, oid: str) -> None:
        """An LFS file; the store knows no users, as its addresses are signed."""
        fault = self.hub.next_upload_fault()
        if fault == "cut":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self._hang_up()
        if fault == "stall":
            threading.Event().wait(60)
            return self._hang_up()
        content = self._read_body()
        if fault == "refuse":
            raise HubError(400, "RequestTimeout")
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "BadDigest")
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.uploads.append(oid)
        self._json({})

    def _make_commit(self, repo: Repo, branch: str, body: bytes) -> None:
        if self.hub.next_commit_is_broken():
            return self._hang_up()
        files, title = dict(repo.find(branch).files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                files[value["path"]] = self._large(**value)
            elif files.pop(value["path"], None) is None:  # a deletedFile
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        with self.hub.lock:
            oid = repo.add(branch, title, files).oid
        url = f"{self.hub.url}/{repo.id}/commit/{oid}"
        self._json({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def _large(self, path: str, oid: str, size: int, **_: object) -> Blob:
        if oid in self.hub.objects:
            return Blob(self.hub.objects[oid], oid, size, lfs=True)
        found = None if self.hub.xet is None else find_xet_hash(self.hub.xet, oid)
        if found is None:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        return Blob(b"", oid, size, lfs=True, xet=found)

    # ------------------------------------------------------------------------------------------------------ downloads

    def _info(self, repo: Repo, revision: str) -> None:
        commit = repo.find(revision)
        files = [{"rfilename": path} for path in commit.files]
        self._json({"id": repo.id, "sha": commit.oid, "private": repo.private, "siblings": files, "tags": [],
                    "downloads": 0, "likes": 0})  # fmt: skip

    def _tree(self, commit: Commit, folder: str) -> None:
        found = {path: blob for path, blob in commit.files.items() if path.startswith(folder.lstrip("/"))}
        if not found:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        entries = []
        for path, blob in found.items():
            large = {"lfs": {"oid": blob.oid, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
            entries.append({"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **large})
            if blob.xet is not None:
                entries[-1]["xetHash"] = blob.xet
        self._json(entries)

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = repo.find(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
        if blob.xet is not None:
            route = f"{self.hub.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": route}
        self._send(200, blob.content, headers)

    # ----------------------------------------------------------------------------------------------------------- HTTP

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
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
