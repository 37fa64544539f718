"""`python -m drafter_service`: wiring, and whether there is a model that fits."""

from __future__ import annotations

import sys
from pathlib import Path

import structlog

from drafter_service.config import DrafterSettings
from drafter_service.server import DrafterEngine, DrafterServer
from easyspec.checkpoint.location import TOKENIZER_PATTERNS, model_path
from easyspec.errors import ConfigurationError
from easyspec.parallel.launch import group_size
from easyspec.rpc.lifecycle import run_role
from easyspec.speculation.sources import MODEL_SOURCES
from easyspec.telemetry.metrics import EngineMetrics
from easyspec.telemetry.tracing import open_tracing
from easyspec.vocabulary import check_vocabularies

_TEXT_SOURCES = "retrieval,ngram"


def build(settings: DrafterSettings) -> DrafterServer:
    metrics, tracing = EngineMetrics("drafter"), open_tracing("drafter", settings.otlp_endpoint)
    if settings.draft_sources & MODEL_SOURCES and settings.tokenizer is not None:
        settings = fitting(settings, settings.tokenizer)
    # Imported here: torch takes seconds, and --help, bad settings and a drafter without a model need none of it.
    engine: DrafterEngine
    if settings.draft_sources & MODEL_SOURCES:
        from drafter_service.engine import DrafterEngine as ModelDrafterEngine

        engine = ModelDrafterEngine(settings, metrics.step)
    else:
        from drafter_service.text_engine import TextDrafterEngine

        engine = TextDrafterEngine(settings, metrics.step)
    return DrafterServer(engine, settings.session_idle_timeout_s, metrics, tracing)


def fitting(settings: DrafterSettings, tokenizer: Path) -> DrafterSettings:
    """The settings, without the model where its vocabulary is another than that of `tokenizer`: such guesses would be
    refused, those from text are not. Raises ConfigurationError on several ranks."""
    paths = [model_path(name, TOKENIZER_PATTERNS) for name in (str(tokenizer), settings.model)]
    try:
        check_vocabularies(*paths)
    except ConfigurationError as error:
        if group_size() > 1:
            raise
        structlog.get_logger().warning("draft_model_does_not_fit", reason=str(error), sources=_TEXT_SOURCES)
        return settings.model_copy(update={"sources": _TEXT_SOURCES})
    return settings


def follow(settings: DrafterSettings) -> None:
    from drafter_service.engine import follow

    follow(settings)


if __name__ == "__main__":
    sys.exit(run_role("drafter", DrafterSettings, build, follow=follow))
