"""Who may guess: the sources of draft tokens, as a set that travels in a few bits."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from easyspec.errors import InvalidRequestError


class DraftSources(enum.IntFlag):
    """A set of sources; also where a draft token came from, several if they agreed."""

    MODEL = 1
    RETRIEVAL = 2
    NGRAM = 4
    EARLY_EXIT = 8

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members, in the order of the bits."""
        return tuple(str(source.name).lower() for source in DraftSources if source in self)


NO_SOURCES = DraftSources(0)
SINGLE_SOURCES = tuple(DraftSources)
TEXT_SOURCES = DraftSources.RETRIEVAL | DraftSources.NGRAM
MODEL_SOURCES = DraftSources.MODEL | DraftSources.EARLY_EXIT
"""Sources that need a draft model: all of its layers, or the first ones."""
ALL_SOURCES = TEXT_SOURCES | MODEL_SOURCES


def parse_sources(names: Iterable[str], field: str = "speculation.sources") -> DraftSources:
    """The set of these names; raises InvalidRequestError for an unknown one."""
    sources = NO_SOURCES
    for name in names:
        source = DraftSources.__members__.get(name.strip().upper())
        if source is None:
            raise InvalidRequestError(field, name, f"some of {', '.join(ALL_SOURCES.names)}")
        sources |= source
    return sources
