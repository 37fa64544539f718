"""Checkpoints and engines that tests of several parts share; built once, each engine started once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import pytest

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.drafts import write_draft
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

NUM_KV_SLOTS = 8192

# An example of microseconds takes half a second where other processes want the cores.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def no_packaged_model_unless_asked_for(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a command starts without a name must not depend on what this machine has fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-requests", type=int, default=10_000, help="requests of each slow fuzz test and surface (default 10000)"
    )
    parser.addoption("--fuzz-seed", type=int, default=2, help="seed of the slow fuzz tests, which print it (default 2)")
    parser.addoption(
        "--schema-sample", type=int, default=0, help="published schemas that the slow corpus test tries (default: all)"
    )


@pytest.fixture(scope="session")
def num_fuzz_requests(pytestconfig: pytest.Config) -> int:
    """Requests that a slow fuzz test sends to a surface."""
    return int(pytestconfig.getoption("--fuzz-requests"))


@pytest.fixture
def fuzz_seed(pytestconfig: pytest.Config) -> int:
    """What a slow fuzz test makes its requests from."""
    seed = int(pytestconfig.getoption("--fuzz-seed"))
    print(f"--fuzz-seed {seed}")  # shown if the test fails
    return seed


@pytest.fixture(scope="session", autouse=True)
def no_rest_unless_asked_for() -> Iterator[None]:
    """Its port is a fixed one by default: tests of REST ask for a free one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYSPEC_GATEWAY_HTTP_ADDRESS", "off")
        yield


class _Engine(Protocol):
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


def _complete(operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine in a loop of its own: engines outlive the loops of single tests."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(operation())
    finally:
        loop.close()


@contextmanager
def started(engine: _Engine) -> Iterator[None]:
    """Start and stop an engine around what uses it, outside of any event loop."""
    _complete(engine.start)
    try:
        yield
    finally:
        _complete(engine.stop)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base model, float32, 256 positions."""
    return write_checkpoint(
        tmp_path_factory.mktemp("base"),
        num_hidden_layers=6,
        max_position_embeddings=256,
        eos_token_id=0,
        std=0.2,
        has_tokenizer=True,
    )


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A draft that often agrees with the base model."""
    return write_draft(tmp_path_factory.mktemp("draft"), base_folder, noise=0.1)


@pytest.fixture(scope="session")
def verifier(base_folder: Path) -> Iterator[VerifierEngine]:
    engine = VerifierEngine(VerifierSettings(model=str(base_folder), num_threads=1, num_kv_slots=NUM_KV_SLOTS))
    with started(engine):
        yield engine


@pytest.fixture(scope="session")
def drafter(draft_folder: Path) -> Iterator[DrafterEngine]:
    engine = DrafterEngine(
        DrafterSettings(model=str(draft_folder), num_threads=1, num_kv_slots=NUM_KV_SLOTS, ask="always")
    )
    with started(engine):
        yield engine


@pytest.fixture(scope="session")
def twin_drafter(base_folder: Path) -> Iterator[DrafterEngine]:
    """A drafter whose draft model is the base model itself."""
    engine = DrafterEngine(
        DrafterSettings(model=str(base_folder), num_threads=1, num_kv_slots=NUM_KV_SLOTS, ask="always")
    )
    with started(engine):
        yield engine
