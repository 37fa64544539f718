"""What a process would write to stderr, kept for a test to look at."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import structlog

from easyspec.telemetry.logs import LogLevel, configure_logging


@contextlib.contextmanager
def captured_logs(role: str = "tested", level: LogLevel = "info") -> Iterator[io.StringIO]:
    """Every event as a line of JSON."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, root_level = root.handlers[:], root.level
    configure_logging(role, "json", stream, level)
    try:
        yield stream
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(root_level)
