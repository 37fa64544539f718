"""The bundled pair behind a gateway, as processes, for clients that know nothing of us."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from easyspec.cli.processes import FREE_PORT, ServiceStack, StackSettings

_ONE_THREAD = dict.fromkeys(("verifier", "drafter"), ("--num-threads", "1"))
_START_TIMEOUT_S = 110.0


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """Where clients find the API. The stack lives in the event loop of a thread of its own: clients block."""
    address: Future[str] = Future()
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def serve() -> None:
        settings = StackSettings(http_address=FREE_PORT, flags=_ONE_THREAD)
        try:
            async with ServiceStack(settings, lambda role, line: None) as stack:
                assert stack.http_address is not None
                address.set_result(f"http://{stack.http_address}/v1")
                await stopping.wait()
        except BaseException as error:
            if not address.done():
                address.set_exception(error)
            raise

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield address.result(_START_TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()
