"""The table of what is read is what the readers, and the parameters of their tests, say."""

from __future__ import annotations

from pathlib import Path

from easyspec.cli.supported import supported_table
from easyspec.model.families import QUANTIZATION_METHODS, SUPPORTED_MODEL_TYPES
from tests.model.test_quantization import CASES

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_page_has_the_table_that_the_command_prints() -> None:
    assert supported_table() in PAGE.read_text(encoding="utf-8")
    for family in SUPPORTED_MODEL_TYPES:
        assert f"\n| {family} | float32, " in supported_table()


def test_every_way_of_quantizing_has_a_case() -> None:
    assert {config["quant_method"] for config, _ in CASES.values()} == set(QUANTIZATION_METHODS)
