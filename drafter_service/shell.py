"""The engine of a drafter as the server sees it, with a draft model or without."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from drafter_service.config import DrafterSettings
from drafter_service.drafter import Drafter
from drafter_service.session import DraftTask, OpenTask
from drafter_service.text.guessers import TextMemory, TextResources
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.engine.shell import EngineShell
from easyspec.speculation.messages import Calibration, Draft, ModelInfo, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest
from easyspec.telemetry.metrics import StepObserver, ignore_step
from easyspec.tokenizer_fingerprint import tokens_by_id


class DrafterShell(EngineShell[Drafter]):
    """Hands sessions' tasks to the drafter's core; building it sets `_info`, `_tokenizer` and, if there are layers, the
    default plan."""

    def __init__(self, settings: DrafterSettings, on_step: StepObserver = ignore_step) -> None:
        super().__init__("drafter-device", settings.step_timeout_s)
        self._settings = settings
        self._on_step = on_step
        self._info: ModelInfo | None = None
        self._tokenizer: Path | None = None
        self.sources = settings.draft_sources
        self.max_tree_nodes = settings.max_tree_nodes
        self.layer_groups = ""
        self.layer_plan = LayerPlanRequest()

    @property
    def model_info(self) -> ModelInfo:
        """The draft model, with the tokenizer of the base it guesses for; valid after `start`."""
        assert self._info is not None, "started"
        return self._info

    async def vocabulary(self) -> Mapping[int, str]:
        """That tokenizer's entries, read from its file: seldom asked for."""
        assert self._tokenizer is not None, "started"
        return await asyncio.to_thread(tokens_by_id, self._tokenizer)

    async def open(self, request: OpenSpeculation) -> int:
        """Open a session and return its id; raises the EasyspecError that the request deserves."""
        return await self._thread.submit_opening(OpenTask(request), self.close)

    async def draft(self, session_id: int, calibration: Calibration) -> Draft:
        """The next tree; raises StalePositionError or InvalidRequestError and then changes nothing."""
        return await self._thread.submit(DraftTask(session_id, calibration))


def open_text_resources(settings: DrafterSettings, fingerprint: str) -> TextResources:
    """Index and table of the settings; raises ConfigurationError for a file that is damaged or of another tokenizer."""
    return TextResources(
        index=SuffixIndex(settings.index, fingerprint) if settings.index is not None else None,
        prior=NgramTable(settings.ngram_prior, fingerprint) if settings.ngram_prior is not None else None,
        memory=TextMemory(int(settings.text_memory_gib * 2**30)),
    )
