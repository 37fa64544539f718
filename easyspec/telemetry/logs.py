"""Logs: one event per line on stderr. Never prompts, completions or token ids."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO, TypeAlias

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat: TypeAlias = Literal["auto", "json", "console"]
LogLevel: TypeAlias = Literal["debug", "info", "warning"]


def configure_logging(role: str, log_format: LogFormat, stream: TextIO | None = None, level: LogLevel = "info") -> None:
    """Set up structlog, and the standard library's warnings, for this process; called once, at its start.

    Every event carries `role`, a UTC timestamp, its level and what is bound in structlog's context variables.
    "auto" is "console" on a terminal and "json" elsewhere. `stream` is stderr unless given: stdout belongs to what
    users asked for. Events below `level` are dropped.
    """
    stream = sys.stderr if stream is None else stream
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _role_adder(role),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render = _renderer(log_format, stream)
    structlog.configure(
        processors=[*before, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _renderer(log_format: LogFormat, stream: TextIO) -> list[Processor]:
    if log_format == "auto":
        log_format = "console" if stream.isatty() else "json"
    if log_format == "console":
        # Not structlog's default traceback, which prints local variables: prompts and token ids among them.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _role_adder(role: str) -> Processor:
    # A processor rather than a context variable: the engine's thread has a context of its own.
    def add_role(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["role"] = role
        return event

    return add_role
