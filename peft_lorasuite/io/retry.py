"""Retries of Hub requests after temporary errors, such as a busy server or a lost connection."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..compat import transport_error_type

Result = TypeVar("Result")

PAUSES = (1.0, 2.0, 4.0)
"""Seconds before the second, third and fourth attempt."""
MAX_PAUSE = 60.0
"""Seconds; if a server asks for a longer pause, there is no retry."""
TEMPORARY = (408, 429, 500, 502, 503, 504)
"""HTTP status codes after which a retry can succeed."""

log = logging.getLogger(__name__)


def with_retries(request: Callable[[], Result]) -> Result:
    """Call ``request``, again after a pause where a retry can help; any other error is raised immediately."""
    for pause in PAUSES:
        try:
            return request()
        except Exception as error:
            delay = retry_delay(error, pause)
            if delay is None:
                raise
            log.info("the Hub did not answer (%s), retrying in %g s", type(error).__name__, delay)
        time.sleep(delay)
    return request()


def retry_delay(error: BaseException, pause: float) -> float | None:
    """Return the seconds to wait before a retry: what the server asks for, else ``pause``; None if it cannot help."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None:
        return pause if isinstance(error, transport_error_type()) else None
    if status not in TEMPORARY:
        return None
    requested = _retry_after(response)
    if requested is None:
        return pause
    return None if requested > MAX_PAUSE else requested


def _retry_after(response: Any) -> float | None:
    """Return the seconds of the Retry-After header; None if it is absent or a date."""
    try:
        return float(response.headers.get("Retry-After"))
    except (TypeError, ValueError, AttributeError):
        return None
