"""The engine of a drafter without a draft model: no weights, no KV memory, no torch; any verifier can use it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drafter_service.config import DrafterSettings
from drafter_service.drafter import CloseTask, Drafter, DrafterLimits, DraftTask, OpenTask
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.fusion.fusing import FusingSource
from drafter_service.text.guessers import TextResources
from easyspec.checkpoint.location import TOKENIZER_PATTERNS, model_path
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.device_thread import DeviceThread
from easyspec.parallel.layer_groups import sequential_plan
from easyspec.speculation.messages import Calibration, Draft, KvUsage, ModelInfo, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest
from easyspec.speculation.sources import DraftSources
from easyspec.telemetry.metrics import StepObserver, ignore_step
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint, tokens_by_id

# Text has no context length; this bounds what one session may hold.
_DEFAULT_MAX_LEN = 1 << 20
# A vocabulary is padded to this many entries at most in practice: ids beyond the tokenizer's are never sampled, but
# a request may contain them.
_MAX_VOCAB_SIZE = 1 << 21


@dataclass(frozen=True)
class TextShape:
    """What sessions must fit where no model says so."""

    vocab_size: int
    num_layers: int = 1


class NoMemory:
    """The KV memory of a drafter without a model."""

    def usage(self, num_sessions: int) -> KvUsage:
        return KvUsage(0, 0, num_sessions)


class TextDrafterEngine:
    """Guesses on a thread of its own, as the engine with a model does."""

    def __init__(self, settings: DrafterSettings, on_step: StepObserver = ignore_step) -> None:
        self._settings = settings
        self._folder = settings.tokenizer or Path(settings.model)  # resolved when the engine is built
        self._on_step = on_step
        self._thread = DeviceThread("drafter-text", settings.step_timeout_s)
        self._drafter: Drafter | None = None
        self._info: ModelInfo | None = None
        self.max_tree_nodes = settings.max_tree_nodes

    async def start(self) -> None:
        """Read tokenizer, index and table; raises ConfigurationError."""
        await self._thread.start(self._build)

    async def stop(self) -> None:
        """End after the step in progress; waiting requests fail as unavailable."""
        await self._thread.stop()

    async def wait_lost(self) -> None:
        """There is no device to lose, but a bug may end the thread."""
        await self._thread.wait_lost()

    @property
    def model_info(self) -> ModelInfo:
        """The tokenizer, as a model without parameters; valid after `start`."""
        assert self._info is not None, "started"
        return self._info

    @property
    def sources(self) -> DraftSources:
        """Who guesses here."""
        return self._settings.draft_sources

    @property
    def layer_groups(self) -> str:
        """There are no layers."""
        return ""

    @property
    def layer_plan(self) -> LayerPlanRequest:
        """There are no layers."""
        return LayerPlanRequest()

    def kv_usage(self) -> KvUsage:
        """No slots, and the number of sessions."""
        assert self._drafter is not None, "started"
        return self._drafter.usage()

    async def vocabulary(self) -> Mapping[int, str]:
        """The tokenizer's entries."""
        return await asyncio.to_thread(tokens_by_id, self._folder)

    async def open(self, request: OpenSpeculation) -> int:
        """Open a session and return its id; raises the EasyspecError that the request deserves."""
        return await self._thread.submit_opening(OpenTask(request), self.close)

    async def draft(self, session_id: int, calibration: Calibration) -> Draft:
        """The next tree; raises StalePositionError or InvalidRequestError and then changes nothing."""
        return await self._thread.submit(DraftTask(session_id, calibration))

    def close(self, session_id: int) -> None:
        """Free a session; idempotent, returns at once."""
        self._thread.post(CloseTask(session_id))

    def _build(self) -> Drafter:
        settings = self._settings
        self._folder = folder = model_path(str(self._folder), TOKENIZER_PATTERNS)
        fingerprint = tokenizer_fingerprint(folder)
        max_len = settings.max_model_len or _DEFAULT_MAX_LEN
        self._info = ModelInfo(
            name=settings.served_model_name,
            vocab_size=max(tokens_by_id(folder), default=-1) + 1,
            max_model_len=max_len,
            tokenizer_fingerprint=fingerprint,
            num_parameters=0,
            dtype="",
            eos_token_ids=(),
            num_layers=0,
        )
        source = FusingSource(None, FusedDrafting(open_text_resources(settings, fingerprint)))
        limits = DrafterLimits(settings.served_model_name, max_len, settings.max_tree_nodes, settings.draft_sources)
        shape, plan = TextShape(_MAX_VOCAB_SIZE), sequential_plan(1)
        self._drafter = Drafter(shape, NoMemory(), source, plan, limits, self._on_step)
        return self._drafter


def open_text_resources(settings: DrafterSettings, fingerprint: str) -> TextResources:
    """Index and table of the settings; raises ConfigurationError for a file that is damaged or of another tokenizer."""
    return TextResources(
        index=SuffixIndex(settings.index, fingerprint) if settings.index is not None else None,
        prior=NgramTable(settings.ngram_prior, fingerprint) if settings.ngram_prior is not None else None,
    )
