from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import structlog
from hypothesis import settings

from easyspec.telemetry.logs import configure_logging

# Property tests here take microseconds an example; a busy machine must not fail them by its clock.
settings.register_profile("rpc", deadline=None)
settings.load_profile("rpc")

Events: TypeAlias = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def events() -> Iterator[Events]:
    """Reads back every event logged so far."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("tested", "json", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
