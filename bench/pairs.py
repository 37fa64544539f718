"""The model pairs a benchmark can run on, and the services that run them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import REPOSITORY
from bench.pair_prompts import HELD_OUT_TEXT, PairPrompts, Questions
from easyspec.checkpoint.location import is_gguf
from easyspec.cli.models import BUNDLED_DRAFTS
from easyspec.cli.packaged_models import SMOLLM2
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT, DRAFTER, GATEWAY, ServiceStack, StackSettings
from easyspec.errors import ConfigurationError

# A draft that is dropped for being late would turn a slow mode into plain decoding.
_GATEWAY_FLAGS = ("--draft-deadline-ms", "60000")


@dataclass(frozen=True)
class ModelPair:
    """A base and a draft checkpoint, and what they are asked; `remedy` says how to come by a missing one.

    Without a draft model the guesses come from the text.
    """

    name: str
    base: Path
    draft: Path | None
    remedy: str
    prompts: PairPrompts = HELD_OUT_TEXT

    @property
    def checkpoints(self) -> list[Path]:
        """What figures depend on."""
        return [self.base] if self.draft is None else [self.base, self.draft]

    def check(self) -> None:
        """Raise ConfigurationError naming the missing checkpoint and the remedy."""
        for path in self.checkpoints:
            if not (path if is_gguf(path) else path / "config.json").is_file():
                raise ConfigurationError(f"no checkpoint in {str(path)!r}; get it with `{self.remedy}`")

    def settings(self, flags: Mapping[str, Sequence[str]]) -> StackSettings:
        """The services that run it."""
        return StackSettings(base=self.base, draft=self.draft, drafts_from_text=self.draft is None, flags=flags)


_SMOLLM2_DRAFT = BUNDLED_DRAFTS[1]


PAIRS = {
    "bundled": ModelPair("bundled", DEFAULT_BASE, DEFAULT_DRAFT, "make train-models"),
    "smollm2": ModelPair(
        "smollm2",
        SMOLLM2.path,
        _SMOLLM2_DRAFT if _SMOLLM2_DRAFT.exists() else None,
        "easyspec fetch smollm2",
        Questions(SMOLLM2.path),
    ),
    "bench": ModelPair("bench", REPOSITORY / ".bench" / "base", DEFAULT_DRAFT, "make bench-pair"),
}


PAIR_HELP = "models to measure: smollm2 needs `easyspec fetch smollm2`, bench `make bench-pair` (default: bundled)"


def pair_stack(pair: ModelPair, drafter_flags: Sequence[str] = ()) -> ServiceStack:
    """Drafter, verifier and gateway of a pair as real processes, to be entered; raises ConfigurationError."""
    pair.check()
    settings = pair.settings({GATEWAY: _GATEWAY_FLAGS, DRAFTER: drafter_flags})
    return ServiceStack(settings, on_log=lambda role, line: None)


@asynccontextmanager
async def start_services(pair: ModelPair, drafter_flags: Sequence[str] = ()) -> AsyncIterator[str]:
    """Run a pair's services and yield the gateway's address."""
    async with pair_stack(pair, drafter_flags) as stack:
        yield stack.gateway_address
