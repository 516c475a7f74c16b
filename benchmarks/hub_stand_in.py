"""The part of the Hugging Face hub's HTTP interface that a pull uses, on loopback, with faults on order.

    with HubStandIn() as hub:
        hub.add("owner/repo", {"m-Q4_K_M.gguf": data}, licence="mit")
        environment = {**os.environ, **hub.environment}

Files are served as the hub serves large ones: `resolve` answers with a redirect, on which the size, the
digest and the commit stand, to another host (here: another port), which knows ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

_PIECE = 16 * 1024


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str
    revisions: tuple[str, ...] = ("main",)
    licence: str | None = None
    gated: bool = False  # described to everybody, given only to the token's owner
    private: bool = False  # as if it were not there
    lfs: bool = True  # whether digests are listed
    claims: dict[str, bytes] = field(default_factory=dict)  # path -> content that is announced instead


@dataclass
class Faults:
    """What goes wrong. Offsets count bytes of a file."""

    drop_at: list[int] = field(default_factory=list)  # cut the connection there, once each
    hold_at: int | None = None  # send no further than this, and wait
    bytes_per_s: float | None = None
    flip_at: int | None = None  # serve another byte there
    no_ranges: bool = False
    # "api", "resolve" or "cdn" -> what to answer, the last one for ever; 0: as usual
    statuses: dict[str, list[int]] = field(default_factory=dict)
    listed: list[str] | None = None  # names the listing has besides the real ones


@dataclass(frozen=True)
class Asked:
    """One request for a file's bytes, as it was answered."""

    path: str
    start: int
    is_range: bool
    status: int


class HubStandIn:
    """TOKEN opens private and gated repositories."""

    TOKEN = "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"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.downloads: list[Asked] = []
        self.requests: list[str] = []  # "METHOD PATH" of all
        self.authorized: list[str] = []  # those that carried an Authorization header
        self.user_agents: set[str] = set()
        self.bytes_sent = 0
        self.connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._release = threading.Event()
        self._hub = _server(self, _HubHandler)
        self._cdn = _server(self, _CdnHandler)

    def __enter__(self) -> HubStandIn:
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing listens any more: the network is gone."""
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._release.set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._cdn.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to take this for the hub."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

    def add(self, name: str, files: Mapping[str, bytes], **more: Any) -> Repo:
        commit = hashlib.sha1(repr((name, sorted(files), more)).encode()).hexdigest()
        self.repos[name] = Repo(dict(files), more.pop("commit", commit), **more)
        return self.repos[name]

    def release(self) -> None:
        """Let those go on who were held, and hold nobody any more."""
        self.faults.hold_at = None
        self._release.set()
        self._release = threading.Event()

    def note(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            line = f"{request.command} {request.path}"
            self.requests.append(line)
            self.user_agents.add(request.headers.get("User-Agent", ""))
            if request.headers.get("Authorization"):
                self.authorized.append(line)

    def next_status(self, where: str) -> int | None:
        with self._lock:
            statuses = self.faults.statuses.get(where)
            if not statuses:
                return None
            return (statuses.pop(0) if len(statuses) > 1 else statuses[0]) or None

    def may_send(self, offset: int, length: int) -> tuple[int, bool]:
        """How many of the next bytes may be sent now, and whether the connection is cut after them."""
        with self._lock:
            for point in self.faults.drop_at:
                if offset <= point < offset + length:
                    self.faults.drop_at.remove(point)
                    return point - offset, True
            release, hold_at = self._release, self.faults.hold_at
        if hold_at is not None and offset + length > hold_at:
            if offset < hold_at:
                return hold_at - offset, False
            release.wait(60)
        return length, False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: HubStandIn

    def setup(self) -> None:
        super().setup()
        self.stand_in.connections.add(self.connection)

    def finish(self) -> None:
        self.stand_in.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        body = json.dumps({"error": message or code or "no"}).encode()
        self.answer(status, body, Content_Type="application/json", **headers)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # whoever asked was killed
            self.close_connection = True


class _HubHandler(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.stand_in.note(self)
        path = unquote(urlsplit(self.path).path)
        described = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        status = self.stand_in.next_status("api" if described else "resolve")
        if status is not None:
            self.refuse(status)
        elif described:
            self._describe(described[1], described[2] or "main")
        elif resolved:
            self._resolve(*resolved.groups())
        else:
            self.refuse(404)

    def _repo(self, name: str, revision: str, *, to_download: bool) -> Repo | None:
        """The repository, or None when the request has been answered."""
        repo = self.stand_in.repos.get(name)
        authorization = self.headers.get("Authorization")
        trusted = authorization == f"Bearer {self.stand_in.TOKEN}"
        if authorization and not trusted:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not trusted):
            # The hub does not tell a stranger whether there is such a repository.
            self.refuse(
                404 if trusted else 401, "RepoNotFound" if trusted else "", "Repository not found"
            )
        elif revision not in (*repo.revisions, repo.commit):
            self.refuse(404, "RevisionNotFound")
        elif to_download and repo.gated and not trusted:
            self.refuse(401, "GatedRepo", "Access to this repository is restricted.")
        else:
            return repo
        return None

    def _describe(self, name: str, revision: str) -> None:
        repo = self._repo(name, revision, to_download=False)
        if repo is None:
            return
        siblings = [
            _sibling(path, repo.claims.get(path, data), repo) for path, data in repo.files.items()
        ]
        siblings += [_sibling(path, b"x", repo) for path in self.stand_in.faults.listed or ()]
        described: dict[str, Any] = {
            "id": name,
            "modelId": name,
            "sha": repo.commit,
            "siblings": siblings,
        }
        described |= {"private": repo.private, "gated": "manual" if repo.gated else False, "tags": []}
        if repo.licence:
            described["cardData"] = {"license": repo.licence}
            described["tags"] = [f"license:{repo.licence}"]
        self.answer(200, json.dumps(described).encode(), Content_Type="application/json")

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name, revision, to_download=True)
        if repo is None:
            return
        if path not in repo.files:
            self.refuse(404, "EntryNotFound")
            return
        claimed = repo.claims.get(path, repo.files[path])
        self.answer(
            302,
            Location=f"{self.stand_in.cdn}/{quote(name)}/{quote(path)}?signature=of-the-hub",
            X_Repo_Commit=repo.commit,
            X_Linked_Etag=f'"{hashlib.sha256(claimed).hexdigest()}"',
            X_Linked_Size=str(len(claimed)),
        )


class _CdnHandler(_Handler):
    def do_GET(self) -> None:
        hub = self.stand_in
        hub.note(self)
        owner, repo, path = unquote(urlsplit(self.path).path).lstrip("/").split("/", 2)
        data = hub.repos[f"{owner}/{repo}"].files[path]
        status = hub.next_status("cdn")
        if status is not None:
            self.refuse(status)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and not hub.faults.no_ranges else 0
        if start >= len(data):
            self.answer(416, Content_Range=f"bytes */{len(data)}")
            return
        partial = wanted is not None and not hub.faults.no_ranges
        hub.downloads.append(Asked(path, start, wanted is not None, 206 if partial else 200))
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self._send(data, start)

    def _send(self, data: bytes, offset: int) -> None:
        hub = self.stand_in
        while offset < len(data):
            length, cut = hub.may_send(offset, min(_PIECE, len(data) - offset))
            piece = bytearray(data[offset : offset + length])
            flip = hub.faults.flip_at
            if flip is not None and offset <= flip < offset + length:
                piece[flip - offset] ^= 1
            self.wfile.write(piece)
            self.wfile.flush()
            hub.bytes_sent += len(piece)
            offset += len(piece)
            if cut:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if hub.faults.bytes_per_s:
                time.sleep(len(piece) / hub.faults.bytes_per_s)


def _sibling(path: str, content: bytes, repo: Repo) -> dict[str, Any]:
    listed: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
    if repo.lfs:
        digest = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return listed


def _server(stand_in: HubStandIn, handler: type[_Handler]) -> ThreadingHTTPServer:
    bound = type(handler.__name__, (handler,), {"stand_in": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads = True
    server.block_on_close = False
    return server
