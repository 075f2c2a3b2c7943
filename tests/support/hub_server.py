"""A real HTTP server on the loopback interface that speaks the Hub's protocol, for tests with the real client.

One socket, two origins, as at the real Hub: the Hub itself is ``http://127.0.0.1:PORT``, its file store (the CDN that
LFS downloads are redirected to) is ``http://localhost:PORT``; the client must not send its token to the latter.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_api import HubApi
from hub_faults import BEFORE, CONTENT, Fault, Faults, Request, slice_file
from hub_protocol import Reply
from hub_repos import Repo

PIECE = 64 * 1024  # bytes written at once, so that the counters move while a slow answer runs


class HubServer:
    """The Hub of a test: plant repositories, order faults, run the real client against ``url``, read the log.

    ``token`` belongs to ``user``, who may write to its own namespace and to ``orgs``. Use it as a context manager;
    leaving it raises when an endpoint failed by itself (an error of this server, not one that a test ordered).
    """

    def __init__(self, user: str = "me", orgs: tuple[str, ...] = ()) -> None:
        self.api = HubApi()
        self.log: list[Request] = []
        self.errors: list[str] = []
        self._faults = Faults()
        self._http = _Http(self)
        port = self._http.server_address[1]
        self.url = self.api.url = f"http://127.0.0.1:{port}"
        self.api.cdn = f"http://localhost:{port}"
        self.token = self.add_user(user, orgs)

    def __enter__(self) -> HubServer:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.close_all()
        if self.errors and kind is None:
            raise RuntimeError("the loopback Hub failed:\n" + "\n".join(self.errors))

    def add_user(self, user: str, orgs: tuple[str, ...] = ()) -> str:
        """Another account; returns its token."""
        token = f"hf_loopback{len(self.api.tokens):02d}{user}"
        self.api.tokens[token], self.api.members[user] = user, {user, *orgs}
        return token

    def revoke(self, token: str) -> None:
        """Make a token invalid from now on."""
        del self.api.tokens[token]

    def grant(self, repo_id: str, user: str = "me") -> None:
        """Let a user through the gate of a gated repository."""
        self.api.repos[repo_id].granted.add(user)

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        *,
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
    ) -> str:
        """Plant a repository (a folder is read recursively), or a further state of one; returns the commit id."""
        if isinstance(files, Path):
            found = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        repo = Repo(repo_id, private=private, gated=gated)
        if revision != "main" and repo_id not in self.api.repos:
            self.api.add({}, repo)  # a Hub repository always has a main branch
        return self.api.add(files, repo, revision).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision; HubError when repository or revision do not exist."""
        return {path: blob.data for path, blob in self.api.repos[repo_id].at(revision).files.items()}

    def history(self, repo_id: str, revision: str = "main") -> list[str]:
        """Titles of the commits, newest first."""
        return [commit.title for commit in self.api.repos[repo_id].history(revision)]

    def fault(
        self,
        kind: str | int,
        pattern: str,
        times: int | None = 1,
        *,
        retry_after: int | None = None,
        delay: float = 1.0,
        every: int = 0,
        after: int = 0,
        reset: bool = False,
    ) -> Fault:
        """Order trouble for the next ``times`` requests (None: all) that match; the Fault returned counts its hits.

        Kinds: a status number such as 429 or 503 (``retry_after`` in seconds goes into the header); ``slow``: waits
        ``delay`` seconds, and again after each ``every`` bytes of a file; ``drop``: hangs up, nothing done; ``lost``:
        does the work, hangs up without answering; ``cut``: hangs up after ``after`` bytes of the file, or of an
        upload's body; ``truncate``: the file ends at ``after`` although its full length is promised, on resumes too;
        ``short``: the first ``after`` bytes, honestly labeled; ``corrupt``: byte ``after`` flipped, hashes unchanged.
        ``reset`` hangs up with a TCP reset instead of a clean end.
        """
        status = int(kind) if str(kind).isdigit() else 0
        return self._faults.add(
            Fault("status" if status else str(kind), pattern, times, status, retry_after, delay, every, after, reset)
        )

    def clear_faults(self) -> None:
        """Withdraw every fault ordered so far."""
        self._faults.clear()

    def requests(self, pattern: str = "") -> list[Request]:
        """The log entries whose ``"METHOD /path"`` matches."""
        return [request for request in self.log if request.matches(pattern)]

    def bytes_sent(self, pattern: str = "") -> int:
        """Body bytes that went out in the matching requests."""
        return sum(request.sent for request in self.requests(pattern))


class _Http(ThreadingHTTPServer):
    """The listening socket; remembers the open connections so that none outlives the test."""

    daemon_threads = True

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.open_connections = hub, set[socket.socket]()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open_connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open_connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away (killed by a test, say) is no fault of the server; all else is noted."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.errors.append(traceback.format_exc())

    def close_all(self) -> None:
        for connection in list(self.open_connections):
            with suppress(OSError):  # the client may have closed it meanwhile
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads a request, asks the API, applies the ordered faults, writes and counts."""

    protocol_version = "HTTP/1.1"
    server: _Http  # pyright: ignore[reportIncompatibleVariableOverride]

    def _serve(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        auth = self.headers.get("Authorization")
        request = Request(self.command, unquote(parts.path), parse_qs(parts.query), auth is not None)
        request.range = self.headers.get("Range")
        hub.log.append(request)
        slow, before = hub._faults.take(request, ("slow",)), hub._faults.take(request, BEFORE)
        upload_cut = hub._faults.take(request, ("cut",)) if self.command in ("POST", "PUT") else None
        body = self._read_body(request, upload_cut.after if upload_cut else None)
        time.sleep(slow.delay if slow else 0)
        trouble = upload_cut or (before if before and before.kind == "drop" else None)
        if trouble or body is None:
            return self._hang_up(reset=bool(trouble and trouble.reset))
        if before and before.kind == "status":
            hint = {} if before.retry_after is None else {"Retry-After": str(before.retry_after)}
            return self._send(Reply.json({"error": "ordered by the test"}, before.status, hint), request, slow)
        try:
            reply = hub.api.answer(self.command, parts.path, request.query, auth, body)
        except Exception:
            hub.errors.append(traceback.format_exc())
            reply = Reply.json({"error": "the loopback Hub failed"}, 500)
        if before and before.kind == "lost":
            return self._hang_up(reset=before.reset)
        return self._send(reply, request, slow)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the names are http.server's

    def _read_body(self, request: Request, limit: int | None) -> bytes | None:
        """The request's body, at most ``limit`` bytes of it; None when the client stopped half-way."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = bytearray()
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            request.received = len(body)
            return bytes(body)
        size = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(size if limit is None else min(size, limit))
        request.received = len(data)
        return data if limit is not None or len(data) == size else None

    def _send(self, reply: Reply, request: Request, slow: Fault | None) -> None:
        ranged = reply.file and reply.status == 200
        fault = self.server.hub._faults.take(request, CONTENT) if ranged and self.command == "GET" else None
        part = slice_file(reply.body, request.range if ranged else None, fault)
        request.status = part.status if ranged else reply.status
        self.send_response(request.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if part.content_range:
            self.send_header("Content-Range", part.content_range)
        self.send_header("Content-Length", str(part.promised))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = slow.every if slow and slow.every else PIECE
        for start in range(0, len(part.body), step):
            piece = part.body[start : start + step]
            self.wfile.write(piece)
            request.sent += len(piece)
            if slow and slow.every:
                time.sleep(slow.delay)
        if len(part.body) < part.promised:
            self._hang_up(reset=bool(fault and fault.reset))

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # closing the descriptor itself, no polite FIN first
        else:
            with suppress(OSError):  # the client may have been faster
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the log is ``HubServer.log``."""
