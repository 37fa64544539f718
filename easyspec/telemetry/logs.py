"""Logs: one event per line on stderr. Never prompts, completions or token ids."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import sys
from typing import Literal, TextIO, TypeAlias, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat: TypeAlias = Literal["auto", "json", "console"]
LogLevel: TypeAlias = Literal["debug", "info", "warning"]


def configure_logging(role: str, log_format: LogFormat, stream: TextIO | None = None, level: LogLevel = "info") -> None:
    """Set up structlog, and the standard library's warnings, for this process; called once, at its start.

    Every event carries `role`, a UTC timestamp, its level and what is bound in structlog's context variables.
    "auto" is "console" on a terminal and "json" elsewhere. `stream` is stderr unless given: stdout belongs to what
    users asked for. Events below `level` are dropped, and so are events that cannot be written at once: the disk is
    full, or the reader of a pipe has gone or reads no more. No request waits or fails for its log.
    """
    if stream is None:
        stream = sys.stderr
        # A full pipe refuses what is written to it, instead of keeping the writer until its reader goes on.
        with contextlib.suppress(OSError, ValueError):  # no file behind it, as in tests
            if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
                os.set_blocking(stream.fileno(), False)

    # A processor rather than a context variable: the engine's thread has a context of its own.
    def add_role(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["role"] = role
        return event

    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_role,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "auto":
        log_format = "console" if stream.isatty() else "json"
    render: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    if log_format == "console":
        # Not structlog's default traceback, which prints local variables: prompts and token ids among them.
        plain = structlog.dev.plain_traceback
        render = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[*before, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _LossyStream(stream))),
    )
    handler = logging.StreamHandler(_LossyStream(stream))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


class _LossyStream(io.TextIOBase):
    """Writes the lines to another stream that it takes whole, and drops the others. For one thread at a time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        self._line += text
        if self._line.endswith("\n"):
            line, self._line = self._line, ""
            with contextlib.suppress(OSError):
                self._stream.write(line)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()
