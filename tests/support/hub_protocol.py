"""The frame of the loopback Hub: calls, replies, the table of routes, and who may read or write what."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from hub_repos import HubError, Repo


@dataclass(frozen=True)
class Call:
    """A request as the endpoints see it; ``user`` is None without a token."""

    user: str | None
    query: Mapping[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to a true value."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Reply:
    """An answer; ``file`` marks bodies that byte ranges and content faults apply to."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: bool = False

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        """A JSON body."""
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def route(method: str, path: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Register a method of a HubState for a path pattern; named groups, unquoted, become its arguments."""

    def register(endpoint: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((method, re.compile(path.replace("REPO", REPO)), endpoint.__name__))
        return endpoint

    return register


class HubState:
    """Repositories, accounts and access; the endpoints stand in a subclass. One lock: every endpoint is atomic."""

    def __init__(self) -> None:
        self.url = self.cdn = ""  # set when the sockets are open; the CDN is another origin, as at the real Hub
        self.page_size = 1000
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        self.members: dict[str, set[str]] = {}  # user -> namespaces it may write to
        self.lock = threading.RLock()

    def answer(self, method: str, path: str, query: Mapping[str, list[str]], auth: str | None, body: bytes) -> Reply:
        """Route one request; errors come back as the Hub words them."""
        try:
            for wanted, pattern, name in ROUTES:
                match = pattern.fullmatch(path)
                if match and wanted == ("GET" if method == "HEAD" else method):
                    user = None if path.startswith("/cdn/") else self._user(auth)
                    with self.lock:
                        arguments = {k: unquote(v or "") for k, v in match.groupdict().items()}
                        return getattr(self, name)(Call(user, query, body), **arguments)
            raise HubError(501, f"The loopback Hub has no {method} {path}")
        except HubError as error:
            return Reply.json({"error": error.message}, error.status, error.headers)

    # -- who may do what ------------------------------------------------------------------------------------------
    def _user(self, auth: str | None) -> str | None:
        if auth is None:
            return None
        user = self.tokens.get(auth.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _owns(self, user: str | None, namespace: str) -> bool:
        return user is not None and namespace in self.members[user]

    def _readable(self, call: Call, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self._owns(call.user, repo.namespace)):
            status, message = (404, "Repository not found") if call.user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        return repo

    def _writable(self, call: Call, repo_id: str) -> Repo:
        repo = self._readable(call, repo_id)
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self._owns(call.user, repo.namespace) and not call.flag("create_pr"):
            raise HubError(403, "Forbidden: you must use a write token with access to this repository")
        return repo

    def _open_gate(self, call: Call, repo: Repo) -> None:
        if not repo.gated or self._owns(call.user, repo.namespace) or call.user in repo.granted:
            return
        what = f"Access to model {repo.id} is restricted"
        if call.user is None:
            raise HubError(401, f"{what}. You must have access to it and be authenticated to access it.", "GatedRepo")
        where = f"Visit {self.url}/{repo.id} to ask for access."
        raise HubError(403, f"{what} and you are not in the authorized list. {where}", "GatedRepo")
