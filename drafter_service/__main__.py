"""`python -m drafter_service`: wiring only."""

from __future__ import annotations

import sys

from drafter_service.config import DrafterSettings
from drafter_service.server import DrafterServer
from easyspec.rpc.lifecycle import run_role
from easyspec.speculation.sources import DraftSources


def build(settings: DrafterSettings) -> DrafterServer:
    if DraftSources.MODEL not in settings.draft_sources:
        from drafter_service.text_engine import TextDrafterEngine

        return DrafterServer(TextDrafterEngine(settings), settings.session_idle_timeout_s)
    # Imported here: torch takes seconds, and --help and bad settings need none of it.
    from drafter_service.engine import DrafterEngine

    return DrafterServer(DrafterEngine(settings), settings.session_idle_timeout_s)


if __name__ == "__main__":
    sys.exit(run_role("drafter", DrafterSettings, build))
