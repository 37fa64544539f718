"""Renders chat templates in a process of their own, which bounds their time and memory."""

from __future__ import annotations

import atexit
import functools
import json
import threading
from typing import Any

import structlog

from easyspec.line_process import LineProcess
from gateway.text.template_worker import CPU_S, MEMORY_BYTES

# What a rendering may take by the clock, and what more the start of the process may, on a busy machine.
_PATIENCE_S, _START_S = 60.0, 240.0

_log = structlog.get_logger()


class TemplateLimitError(Exception):
    """A template took more than it may."""


class TemplateProcess:
    """One process for all templates and threads; started when it is wanted first, replaced when it is lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = LineProcess(("-m", "gateway.text.template_worker"), _PATIENCE_S, _START_S, {})

    def render(self, source: str, **arguments: Any) -> str:
        """What the library's `render_jinja_template` makes of `messages` and other arguments by this template. Raises
        TemplateLimitError, and ValueError with the template's own words."""
        line = json.dumps({**arguments, "chat_template": source}, default=str).encode() + b"\n"
        with self._lock:
            try:
                answered = self._process.ask(line)
            except TimeoutError:
                answered = b""
        if not answered:
            _log.warning("chat_template_lost")
            raise TemplateLimitError(f"the chat template takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MiB for it")
        answer = json.loads(answered)
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            self._process.close()


@functools.cache
def template_process() -> TemplateProcess:
    process = TemplateProcess()
    atexit.register(process.close)
    return process
