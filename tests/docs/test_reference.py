"""The generated pages are what the code says today."""

from __future__ import annotations

import pytest

from docs.reference.__main__ import DOCS, PAGES
from drafter_service.config import DrafterSettings
from gateway.service.config import GatewaySettings
from verifier_service.config import VerifierSettings


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_current(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("settings", [GatewaySettings, DrafterSettings, VerifierSettings])
def test_no_setting_is_left_out(settings: type) -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in settings.model_fields if f"`--{name.replace('_', '-')}`" not in text] == []
