"""What a rank of a test reports of the code under test: what it logs and what it raises."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any


class Records(logging.Handler):
    """What was logged, as (level, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        self.lines.append((record.levelname, record.getMessage()))


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[tuple[str, str]]]:
    """The lines that go to the logger ``name``, from INFO on, as (level, text)."""
    logger = logging.getLogger(name)
    handler = Records()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    """The type and the text of what a call raises."""
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError(f"no error, but {result!r}")
