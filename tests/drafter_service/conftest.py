from __future__ import annotations

from pathlib import Path

import pytest

from tests.drafter_service.core_driver import CoreDriver, build_core


@pytest.fixture(scope="package")
def core(draft_folder: Path) -> CoreDriver:
    return build_core(draft_folder)
