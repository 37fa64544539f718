"""`python -m drafter_service`: wiring only."""

from __future__ import annotations

import sys

from drafter_service.config import DrafterSettings
from drafter_service.server import DrafterEngine, DrafterServer
from easyspec.rpc.lifecycle import run_role
from easyspec.speculation.sources import MODEL_SOURCES
from easyspec.telemetry.metrics import EngineMetrics, StepObserver
from easyspec.telemetry.tracing import open_tracing


def build(settings: DrafterSettings) -> DrafterServer:
    metrics = EngineMetrics("drafter")
    return DrafterServer(
        _engine(settings, metrics.step),
        settings.session_idle_timeout_s,
        metrics,
        open_tracing("drafter", settings.otlp_endpoint),
    )


def _engine(settings: DrafterSettings, on_step: StepObserver) -> DrafterEngine:
    if not settings.draft_sources & MODEL_SOURCES:
        from drafter_service.text_engine import TextDrafterEngine

        return TextDrafterEngine(settings, on_step)
    # Imported here: torch takes seconds, and --help, bad settings and a drafter without a model need none of it.
    from drafter_service.engine import DrafterEngine as ModelDrafterEngine

    return ModelDrafterEngine(settings, on_step)


def follow(settings: DrafterSettings) -> None:
    from drafter_service.engine import follow

    follow(settings)


if __name__ == "__main__":
    sys.exit(run_role("drafter", DrafterSettings, build, follow=follow))
