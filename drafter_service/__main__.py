"""`python -m drafter_service`: wiring only."""

from __future__ import annotations

import sys

from drafter_service.config import DrafterSettings
from drafter_service.server import DrafterServer
from easyspec.rpc.lifecycle import run_role


def build(settings: DrafterSettings) -> DrafterServer:
    # Imported here: torch takes seconds, and --help and bad settings need none of it.
    from drafter_service.engine import DrafterEngine

    return DrafterServer(DrafterEngine(settings), settings.session_idle_timeout_s)


def follow(settings: DrafterSettings) -> None:
    from drafter_service.engine import follow

    follow(settings)


if __name__ == "__main__":
    sys.exit(run_role("drafter", DrafterSettings, build, follow=follow))
