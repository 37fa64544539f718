"""`python -m drafter_service`: wiring only."""

from __future__ import annotations

import sys

from drafter_service.config import DrafterSettings
from drafter_service.server import DrafterServer
from easyspec.rpc.lifecycle import run_role
from easyspec.telemetry.metrics import EngineMetrics
from easyspec.telemetry.tracing import open_tracing


def build(settings: DrafterSettings) -> DrafterServer:
    # Imported here: torch takes seconds, and --help and bad settings need none of it.
    from drafter_service.engine import DrafterEngine

    metrics = EngineMetrics("drafter")
    tracing = open_tracing("drafter", settings.otlp_endpoint)
    return DrafterServer(DrafterEngine(settings, metrics.step), settings.session_idle_timeout_s, metrics, tracing)


def follow(settings: DrafterSettings) -> None:
    from drafter_service.engine import follow

    follow(settings)


if __name__ == "__main__":
    sys.exit(run_role("drafter", DrafterSettings, build, follow=follow))
