"""A drafter without a model: a small process, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from drafter_service.config import DrafterSettings
from easyspec.errors import ConfigurationError
from easyspec.settings import load_settings

ROOT = Path(__file__).parents[2]
# Drafts once in a process of its own, then says what was imported and how much memory that took.
SCRIPT = """
import asyncio, re, sys
from drafter_service.__main__ import build
from drafter_service.config import DrafterSettings
from easyspec.speculation.messages import Calibration, OpenSpeculation
from easyspec.speculation.parameters import SamplingParameters, TreeBudget

async def main():
    server = build(DrafterSettings(sources="retrieval,ngram", tokenizer=sys.argv[1]))
    await server.start()
    engine = server._engine
    session = await engine.open(OpenSpeculation((1, 2, 3, 4) * 100, SamplingParameters(seed=1)))
    draft = await engine.draft(session, Calibration(400, (1, 2), TreeBudget(4, 4, 8)))
    await server.stop()
    print(len(draft.tree), "torch" in sys.modules, "transformers" in sys.modules,
          int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)

asyncio.run(main())
"""


def test_it_neither_imports_torch_nor_takes_much_memory(draft_folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(draft_folder)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    num_nodes, has_torch, has_transformers, memory_mib = run.stdout.split()
    assert (int(num_nodes) > 0, has_torch, has_transformers) == (True, "False", "False")
    assert int(memory_mib) < 150  # Python, gRPC and numpy take most of it


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "model .*is not set"),
        (["--sources", "early_exit,ngram", "--tokenizer", "x"], "model .*is not set"),
        (["--sources", "retrieval,ngram"], "tokenizer is not set"),
        (["--sources", "retrieval,oracle", "--tokenizer", "x"], "oracle"),
    ],
)
def test_settings_that_do_not_fit_are_named(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        load_settings(DrafterSettings, flags)


def test_a_drafter_without_a_model_is_called_text() -> None:
    settings = load_settings(DrafterSettings, ["--sources", "ngram", "--tokenizer", "models/base"])
    assert settings.served_model_name == "text"
    assert load_settings(DrafterSettings, ["--model", "models/draft"]).served_model_name == "draft"
