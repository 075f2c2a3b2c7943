"""Messages of transformers and accelerate about what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def drop_messages(name: str) -> Iterator[None]:
    """Drop what a logger reports. Its level stays: a raised one makes transformers check the plans of sharding."""
    logger = logging.getLogger(name)
    logger.addFilter(_drop)
    try:
        yield
    finally:
        logger.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
