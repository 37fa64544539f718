"""What sessions of a drafter may ask for, and must fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from easyspec.speculation.messages import KvUsage
from easyspec.speculation.sources import DraftSources


@dataclass(frozen=True)
class DrafterLimits:
    """What one session may ask for; `max_model_len` is what fits the KV memory.

    `sources` guess where a session names none. `early_exits` are those of the draft model that sessions
    may use; there may be none, for the reason `no_exits_because`.
    """

    served_model_name: str
    max_model_len: int
    max_tree_nodes: int
    sources: DraftSources = DraftSources.MODEL
    early_exits: tuple[int, ...] = ()
    no_exits_because: str = ""

    @property
    def known_sources(self) -> DraftSources:
        """The sources that a session may name."""
        has_more = bool(self.early_exits) and DraftSources.MODEL in self.sources
        return self.sources | DraftSources.EARLY_EXIT if has_more else self.sources


class DrafterShape(Protocol):
    """What sessions must fit: of the draft model, or of a tokenizer where there is no model."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...


class MeasuredMemory(Protocol):
    """KV memory, seen from outside."""

    def usage(self, num_sessions: int) -> KvUsage: ...
