"""The model pairs a benchmark can run on, and the services that run them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.harness.flags import flag
from bench.harness.machine import REPOSITORY
from bench.harness.prompts import HELD_OUT_TEXT, PairPrompts, Questions
from easyspec.checkpoint.location import is_gguf
from easyspec.cli.packaged_models import SMOLLM2
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT, DRAFTER, GATEWAY, VERIFIER, ServiceStack, StackSettings
from easyspec.errors import ConfigurationError
from easyspec.ops.executor import EXECUTORS

# A draft that is dropped for being late would turn a slow mode into plain decoding.
_GATEWAY_FLAGS = ("--draft-deadline-ms", "60000")
_WIDENED = REPOSITORY / ".bench"


@dataclass(frozen=True)
class ModelPair:
    """A base and a draft checkpoint, and what they are asked; `remedy` says how to come by a missing one. Without a
    draft model the guesses come from the text. `also` are further bases by name, behind the same drafter."""

    name: str
    base: Path
    draft: Path | None
    remedy: str
    prompts: PairPrompts = HELD_OUT_TEXT
    also: Mapping[str, Path] | None = None

    @property
    def checkpoints(self) -> list[Path]:
        """What figures depend on."""
        drafts = [] if self.draft is None else [self.draft]
        return [self.base, *drafts, *(self.also or {}).values()]

    def check(self) -> None:
        """Raise ConfigurationError naming the missing checkpoint and the remedy."""
        for path in self.checkpoints:
            if not (path if is_gguf(path) else path / "config.json").is_file():
                raise ConfigurationError(f"no checkpoint in {str(path)!r}; get it with `{self.remedy}`")


PAIRS = {
    "bundled": ModelPair("bundled", DEFAULT_BASE, DEFAULT_DRAFT, "make train-models"),
    "smollm2": ModelPair("smollm2", SMOLLM2.path, None, "easyspec fetch smollm2", Questions(SMOLLM2.path)),
    "bench": ModelPair("bench", _WIDENED / "base", DEFAULT_DRAFT, "make bench-pair"),
    # Drafting a tree takes about as long as a pass of the base.
    "even": ModelPair("even", _WIDENED / "base", _WIDENED / "draft", "make bench-pair"),
}
PAIR = flag("Models to measure: smollm2 needs `easyspec fetch smollm2`, bench, even `make bench-pair`.", choices=PAIRS)
EXECUTOR = flag("What computes both models; native-8bit rounds inputs as llama.cpp does.", choices=EXECUTORS)


def executor_flags(executor: str) -> dict[str, Sequence[str]]:
    return dict.fromkeys((VERIFIER, DRAFTER), ("--executor", executor))


@asynccontextmanager
async def start_services(
    pair: ModelPair, flags: Mapping[str, Sequence[str]] | None = None
) -> AsyncIterator[ServiceStack]:
    """Run drafter, verifier and gateway as real processes; `flags` by role. Raises EasyspecError."""
    pair.check()
    wanted = {GATEWAY: (), **(flags or {})}
    settings = StackSettings(
        base=pair.base,
        draft=pair.draft,
        drafts_from_text=pair.draft is None,
        also=dict(pair.also or {}),
        flags={**wanted, GATEWAY: (*_GATEWAY_FLAGS, *wanted[GATEWAY])},
    )
    async with ServiceStack(settings, on_log=lambda role, line: None) as stack:
        yield stack
