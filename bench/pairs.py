"""The model pairs a benchmark can run on, and the services that run them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.cosine import CosineRow, cosine_table
from bench.machine import REPOSITORY
from bench.measurement import LAYER_PARALLEL_SIZES
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT, DRAFTER, GATEWAY, ServiceStack, StackSettings
from easyspec.errors import ConfigurationError
from models.heldout import held_out_prompts

_COSINE_PROMPTS = 16
_COSINE_PROMPT_CHARS = 800
_COSINE_POSITIONS = 40
# A draft that is dropped for being late would turn a slow mode into plain decoding.
_GATEWAY_FLAGS = ("--draft-deadline-ms", "60000")


@dataclass(frozen=True)
class ModelPair:
    """A base and a draft checkpoint folder; `remedy` says how to make a missing one."""

    name: str
    base: Path
    draft: Path
    remedy: str

    def check(self) -> None:
        """Raise ConfigurationError naming the missing folder and the remedy."""
        for folder in (self.base, self.draft):
            if not (folder / "config.json").is_file():
                raise ConfigurationError(f"no checkpoint in {str(folder)!r}; make it with `{self.remedy}`")


PAIRS = {
    "bundled": ModelPair("bundled", DEFAULT_BASE, DEFAULT_DRAFT, "make train-models"),
    "bench": ModelPair("bench", REPOSITORY / ".bench" / "base", DEFAULT_DRAFT, "make bench-pair"),
}


@asynccontextmanager
async def start_services(pair: ModelPair, drafter_flags: Sequence[str] = ()) -> AsyncIterator[str]:
    """Run drafter, verifier and gateway as real processes and yield the gateway's address."""
    pair.check()
    settings = StackSettings(base=pair.base, draft=pair.draft, flags={GATEWAY: _GATEWAY_FLAGS, DRAFTER: drafter_flags})
    async with ServiceStack(settings, on_log=lambda role, line: None) as stack:
        yield stack.gateway_address


def cosine_rows(pair: ModelPair) -> list[CosineRow]:
    """Cosine table of the pair's draft model at the last positions of held-out texts."""
    texts = held_out_prompts(_COSINE_PROMPTS, seed=0, max_chars=_COSINE_PROMPT_CHARS)
    return cosine_table(pair.draft, texts, LAYER_PARALLEL_SIZES, _COSINE_POSITIONS)
