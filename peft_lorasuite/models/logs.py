"""Messages and bars of transformers and accelerate about what was asked for."""

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


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide transformers' bar for the weights of a model: one for every model that is loaded, between our own.

    Its switch is also that of the Hub's bars, which get back what they had.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, hub_hidden = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    if not shown:
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        if hub_hidden:
            disable_progress_bars()


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
