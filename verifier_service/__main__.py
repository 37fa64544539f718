"""`python -m verifier_service`: wiring only."""

from __future__ import annotations

import sys

from easyspec.rpc.lifecycle import run_role
from easyspec.telemetry.metrics import EngineMetrics
from easyspec.telemetry.tracing import open_tracing
from verifier_service.config import VerifierSettings
from verifier_service.server import VerifierServer


def build(settings: VerifierSettings) -> VerifierServer:
    # Imported here: torch takes seconds, and --help and bad settings need none of it.
    from verifier_service.engine import VerifierEngine

    metrics = EngineMetrics("verifier")
    tracing = open_tracing("verifier", settings.otlp_endpoint)
    return VerifierServer(VerifierEngine(settings, metrics.step), settings.session_idle_timeout_s, metrics, tracing)


def follow(settings: VerifierSettings) -> None:
    from verifier_service.engine import follow

    follow(settings)


if __name__ == "__main__":
    sys.exit(run_role("verifier", VerifierSettings, build, follow=follow))
