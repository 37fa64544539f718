from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from hypothesis import settings

from tests.fakes.captured_logs import captured_logs

# Property tests here take microseconds an example; a busy machine must not fail them by its clock.
settings.register_profile("rpc", deadline=None)
settings.load_profile("rpc")

Events: TypeAlias = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def events() -> Iterator[Events]:
    """Reads back every event logged so far."""
    with captured_logs(level="debug") as stream:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
