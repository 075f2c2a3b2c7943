r"""What the loopback Hub notes about every request, and the faults that a test can order from it.

Patterns are regular expressions searched in ``"METHOD /path"`` (path unquoted, without its query), for instance
``r"^GET .*\.safetensors$"``, ``"me/old-lora/"`` or ``r"^POST .*/commit/main$"``.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

BEFORE = ("status", "drop", "lost")  # replace the whole answer, on any method
CONTENT = ("cut", "truncate", "short", "corrupt")  # spoil the body of a successful GET; "cut" also stops an upload
KINDS = ("slow", *BEFORE, *CONTENT)


@dataclass
class Request:
    """One request as the server saw it; ``sent`` and ``received`` count body bytes, never headers."""

    method: str
    path: str
    query: dict[str, list[str]]
    authorized: bool  # an Authorization header came along; the token itself is not kept
    range: str | None = None
    status: int = 0  # 0: the connection was dropped without an answer
    sent: int = 0
    received: int = 0
    fault: str | None = None

    @property
    def line(self) -> str:
        """The text that patterns are searched in."""
        return f"{self.method} {self.path}"

    def matches(self, pattern: str) -> bool:
        """Whether the pattern is found in the line."""
        return re.search(pattern, self.line) is not None


@dataclass
class Fault:
    """One order for trouble; ``hits`` counts how often it struck."""

    kind: str
    pattern: str
    times: int | None  # None: until cleared
    status: int = 503
    retry_after: int | None = None
    delay: float = 1.0
    every: int = 0
    after: int = 0
    reset: bool = False
    hits: int = field(default=0, init=False)

    @property
    def spent(self) -> bool:
        """Whether it will strike no more."""
        return self.times is not None and self.hits >= self.times


class Faults:
    """The standing orders, oldest first."""

    def __init__(self) -> None:
        self._orders: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Take an order; ValueError on an unknown kind or a broken pattern."""
        if fault.kind not in KINDS:
            raise ValueError(
                f"unknown fault {fault.kind!r}; known: a status number, {', '.join(KINDS[:1] + KINDS[2:])}"
            )
        re.compile(fault.pattern)
        with self._lock:
            self._orders.append(fault)
        return fault

    def clear(self) -> None:
        """Forget every order."""
        with self._lock:
            self._orders.clear()

    def take(self, request: Request, kinds: tuple[str, ...]) -> Fault | None:
        """The first order of one of these kinds that fits the request, counted as struck; None without one."""
        with self._lock:
            for fault in self._orders:
                if fault.kind in kinds and not fault.spent and request.matches(fault.pattern):
                    fault.hits += 1
                    request.fault = fault.kind
                    return fault
        return None


@dataclass(frozen=True)
class Slice:
    """The part of a file that one answer carries."""

    status: int  # 200, 206 or 416
    promised: int  # Content-Length
    body: bytes  # what really goes over the wire; shorter than promised when the connection will be cut
    content_range: str | None = None


def slice_file(data: bytes, header: str | None, fault: Fault | None) -> Slice:
    """Apply a ``Range`` header and a content fault to a file.

    ``cut`` ends the connection after ``after`` bytes of this answer, once per strike: a resume gets the rest.
    ``truncate`` behaves as a store that lost all after byte ``after`` but still promises the full length.
    ``short`` answers with the first ``after`` bytes and says so. ``corrupt`` flips byte ``after``.
    """
    kind, after = (fault.kind, fault.after) if fault else ("", 0)
    if kind == "short":
        data = data[:after]
    elif kind == "corrupt" and data:
        data = data[:after] + bytes([data[after] ^ 0xFF]) + data[after + 1 :]
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    start, stop = _bounds(match[1], match[2], len(data)) if match else (0, len(data))
    if start >= stop and match:
        return Slice(416, 0, b"", f"bytes */{len(data)}")
    part = data[start:stop]
    body = part[:after] if kind == "cut" else data[start : min(stop, after)] if kind == "truncate" else part
    if not match:
        return Slice(200, len(part), body)
    return Slice(206, len(part), body, f"bytes {start}-{stop - 1}/{len(data)}")


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    """The half-open interval of a byte range; ``-n`` means the last n bytes."""
    if not first:
        return (max(size - int(last), 0), size) if last else (size, size)
    return int(first), min(int(last) + 1, size) if last else size
