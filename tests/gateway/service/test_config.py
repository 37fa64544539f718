from __future__ import annotations

from pathlib import Path

import pytest

from easyspec.errors import ConfigurationError
from easyspec.settings import load_settings
from gateway.service.config import GatewaySettings


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYSPEC_GATEWAY_TREE_WIDTH", "7")
    monkeypatch.setenv("EASYSPEC_GATEWAY_TOKENIZER", "/models/base")
    settings = load_settings(GatewaySettings, ["--num-draft-levels", "3"])
    assert (settings.default_budget.num_levels, settings.default_budget.width) == (3, 7)
    assert settings.tokenizer == Path("/models/base")
    assert settings.drafter_address is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["tokenizer", "not set"]),
        (["--tokenizer", "x", "--draft-deadline-ms", "0"], ["draft_deadline_ms", "'0'", "1 to 600000"]),
        (["--tokenizer", "x", "--tree-width", "many"], ["tree_width", "'many'", "1 to 64"]),
    ],
)
def test_bad_settings_are_named(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(GatewaySettings, flags)
    for word in words:
        assert word in str(caught.value)
