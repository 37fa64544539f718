"""The W3C trace context of the request at hand, as it came in or as it goes on; knows no tracing library."""

from __future__ import annotations

import contextvars
import re

TRACEPARENT_KEY = "traceparent"

_FORM = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# Belongs to the task of a request, as the request id in structlog's does.
_current: contextvars.ContextVar[str | None] = contextvars.ContextVar("traceparent", default=None)


def bind_traceparent(value: str | None) -> None:
    """Set it for this task and the tasks that it starts; what is malformed counts as nothing."""
    _current.set(value if value is not None and _FORM.fullmatch(value) else None)


def current_traceparent() -> str | None:
    """What the next service, or span, has for its parent."""
    return _current.get()
