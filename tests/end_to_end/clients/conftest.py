"""The bundled pair behind a gateway, as processes, for clients that know nothing of us."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from easyspec.cli.processes import FREE_PORT, ServiceStack, StackSettings
from tests.fakes.threads import in_thread

_SETTINGS = StackSettings(http_address=FREE_PORT, flags=dict.fromkeys(("verifier", "drafter"), ("--num-threads", "1")))


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """Where clients find the API."""
    with in_thread(lambda: ServiceStack(_SETTINGS, lambda role, line: None)) as stack:
        yield f"http://{stack.http_address}/v1"
