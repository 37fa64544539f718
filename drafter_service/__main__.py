"""`python -m drafter_service`: wiring only."""

from __future__ import annotations

import sys

from drafter_service.config import DrafterSettings
from drafter_service.server import DrafterServer
from easyspec.rpc.lifecycle import run_role
from easyspec.telemetry.metrics import EngineMetrics


def build(settings: DrafterSettings) -> DrafterServer:
    # Imported here: torch takes seconds, and --help and bad settings need none of it.
    from drafter_service.engine import DrafterEngine

    metrics = EngineMetrics("drafter")
    return DrafterServer(DrafterEngine(settings, metrics.step), settings.session_idle_timeout_s, metrics)


if __name__ == "__main__":
    sys.exit(run_role("drafter", DrafterSettings, build))
