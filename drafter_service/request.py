"""What a request asks of the drafter: fixed for the whole session."""

from __future__ import annotations

from dataclasses import dataclass

from drafter_service.grammar_preference import GrammarPreference
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import MODEL_SOURCES, TEXT_SOURCES, DraftSources


@dataclass(frozen=True)
class DraftRequest:
    """At most `max_length` tokens are ever committed. `calibration` False keeps fuzzy KV entries, for the ablation.

    `target` tells base models apart: what is learned about acceptance by one must not be held against another.
    """

    sampling: SamplingParameters
    plan: LayerPlan
    max_length: int
    calibration: bool = True
    sources: DraftSources = DraftSources.MODEL
    preference: GrammarPreference | None = None
    target: str = ""
    drafts_ahead: bool = True

    @property
    def asks_model(self) -> bool:
        return bool(self.sources & MODEL_SOURCES)

    @property
    def asks_text(self) -> bool:
        return bool(self.sources & TEXT_SOURCES)
