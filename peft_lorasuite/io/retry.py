"""Trying again what failed for a moment: a busy server, a cut connection."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

PAUSES = (1.0, 2.0, 4.0)
"""Seconds before the second, third and fourth try."""
LONGEST = 60.0
"""A server that asks for a longer pause is not waited for."""
BUSY = (408, 429, 500, 502, 503, 504)

log = logging.getLogger(__name__)


def with_retries(work: Callable[[], Result]) -> Result:
    """Run ``work``, again after a pause where a new try can help; what no new try can help is raised at once."""
    for pause in PAUSES:
        try:
            return work()
        except Exception as error:
            wait = retry_delay(error, pause)
            if wait is None:
                raise
            log.info("the Hub did not answer (%s), trying again in %g s", type(error).__name__, wait)
        time.sleep(wait)
    return work()


def retry_delay(error: BaseException, pause: float) -> float | None:
    """Return the seconds to wait before a new try; None for an error that a new try would meet again."""
    status, answer = getattr(getattr(error, "response", None), "status_code", None), getattr(error, "response", None)
    if status is None:
        return pause if isinstance(error, transport_error_type()) else None
    if status not in BUSY:
        return None
    asked = _seconds(answer)
    return None if asked is not None and asked > LONGEST else asked if asked is not None else pause


def transport_error_type() -> type[BaseException]:
    """Return the base error of the HTTP library that this huggingface_hub is built on: httpx, later httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _seconds(answer: Any) -> float | None:
    try:
        return float(answer.headers.get("Retry-After"))
    except (TypeError, ValueError, AttributeError):  # absent, or a date
        return None
