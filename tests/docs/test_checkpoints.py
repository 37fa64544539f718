"""The table of what is read is what the readers, and the parameters of their tests, say."""

from __future__ import annotations

from pathlib import Path

from easyspec.cli.models import supported_table
from easyspec.model.model_families import FAMILIES
from easyspec.model.supported_models import (
    GGUF_MODEL_TYPES,
    QUANTIZATION_METHODS,
    SUPPORTED_MODEL_TYPES,
    TOWER_MODEL_TYPES,
)
from tests.fakes.families import FAMILY_OPTIONS
from tests.model.test_fused_experts import test_experts_in_mxfp4
from tests.model.test_gguf_families import FAMILIES as GGUF_CASES
from tests.model.test_quantization import CASES
from tests.model.test_text_towers import TOWERS

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_page_has_the_table_that_the_command_prints() -> None:
    assert supported_table() in PAGE.read_text(encoding="utf-8")
    for family in SUPPORTED_MODEL_TYPES:
        assert f"\n| {family} | float32, " in supported_table()


def test_every_way_of_quantizing_has_a_case() -> None:
    assert {config["quant_method"] for config, _ in CASES.values()} | {"mxfp4"} == set(QUANTIZATION_METHODS)
    assert callable(test_experts_in_mxfp4)


def test_every_family_has_a_checkpoint_in_the_tests() -> None:
    towers = set(TOWER_MODEL_TYPES)
    assert set(FAMILY_OPTIONS) == set(SUPPORTED_MODEL_TYPES) - towers == set(FAMILIES)
    assert set(TOWERS) == towers
    assert set(GGUF_MODEL_TYPES.values()) | {"mixtral"} == set(GGUF_CASES)
