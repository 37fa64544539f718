from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import easyspec
from tests.fakes.tiny_tokenizer import write_tokenizer

CHECKOUT = Path(easyspec.__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that passes for a checkpoint with the fakes, which read its tokenizer only."""
    folder = write_tokenizer(tmp_path_factory.mktemp("checkpoint"))
    (folder / "config.json").write_text("{}")
    return folder


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


Command = Callable[..., Coroutine[Any, Any, Ended]]


@pytest.fixture
def easyspec_command() -> Command:
    """Runs the `easyspec` command in a process of its own."""

    async def run(*arguments: str) -> Ended:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "easyspec.cli.main",
            *arguments,
            cwd=CHECKOUT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"COLUMNS": "200"},
        )
        stdout, stderr = await process.communicate()
        assert process.returncode is not None
        return Ended(process.returncode, stdout.decode(), stderr.decode())

    return run
