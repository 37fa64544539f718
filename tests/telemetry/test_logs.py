from __future__ import annotations

import io
import json
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import structlog

from easyspec.telemetry.logs import configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_events_carry_role_level_time_and_context_on_every_thread() -> None:
    stream = io.StringIO()
    configure_logging("drafter", "json", stream)
    structlog.contextvars.bind_contextvars(request_id="r1")
    structlog.get_logger().info("loaded", num_layers=12)
    worker = threading.Thread(target=lambda: structlog.get_logger().warning("slow"))
    worker.start()
    worker.join()
    loaded, slow = (json.loads(line) for line in stream.getvalue().splitlines())
    assert loaded.pop("timestamp").endswith("Z")
    assert loaded == {"event": "loaded", "num_layers": 12, "role": "drafter", "level": "info", "request_id": "r1"}
    assert (slow["event"], slow["role"], slow["level"]) == ("slow", "drafter", "warning")


def test_auto_is_console_on_a_terminal_and_json_elsewhere() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    configure_logging("drafter", "auto", terminal)
    structlog.get_logger().info("loaded")
    configure_logging("drafter", "auto", pipe)
    structlog.get_logger().info("loaded")
    assert "loaded" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")
    assert json.loads(pipe.getvalue())["event"] == "loaded"


def test_warnings_of_other_libraries_come_as_events_too() -> None:
    stream = io.StringIO()
    configure_logging("gateway", "json", stream)
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("%s is odd", "this")
    [event] = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (event["event"], event["role"], event["level"]) == ("this is odd", "gateway", "warning")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_local_variables(log_format: str) -> None:
    stream = io.StringIO()
    configure_logging("verifier", log_format, stream)  # type: ignore[arg-type]

    def fail() -> None:
        prompt = "se" + "cret"
        raise RuntimeError(f"failed on {len(prompt)} characters")

    try:
        fail()
    except RuntimeError:
        structlog.get_logger().exception("rpc_bug")
    assert "failed on 6 characters" in stream.getvalue()
    assert "secret" not in stream.getvalue()


def test_a_full_disk_costs_events_and_nothing_else() -> None:
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        configure_logging("gateway", "json", full)
        structlog.get_logger().info("dropped")
        logging.getLogger("some.library").warning("dropped too")
        with pytest.raises(OSError, match="No space"):  # what the events met
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed


def test_a_pipe_that_is_not_read_does_not_hold_the_writer() -> None:
    script = (
        "import structlog; from easyspec.telemetry.logs import configure_logging\n"
        "configure_logging('gateway', 'json')\n"
        "for _ in range(3000): structlog.get_logger().info('x' * 100)\n"
        "print('written')"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert select.select([process.stdout], [], [], 30)[0], "it waits for the reader of its log"
            assert process.stdout.readline() == b"written\n"
            assert all(json.loads(line)["event"] for line in process.stderr.read().splitlines())
        finally:
            process.kill()
