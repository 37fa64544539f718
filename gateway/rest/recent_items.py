"""Items of recent answers of `/v1/responses`, which some clients refer to by id instead of sending them again, unless
they are told that nothing is stored. Kept in this process alone, for a while, as far as there is room."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_MAX_AGE_S = 3600.0
_MAX_BYTES = 32 * 1024 * 1024
# What Python needs for an entry beside its text.
_ENTRY_BYTES = 500


class RecentItems:
    """Items by their client and id; the oldest go first when they are too many. `clock` counts seconds."""

    def __init__(self, max_bytes: int = _MAX_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        # An item's text, and when it is forgotten.
        self._entries: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        self._num_bytes = 0

    def remember(self, client: str, items: Iterable[Mapping[str, Any]]) -> None:
        for item in items:
            text = json.dumps(item)
            self._entries[client, item["id"]] = text, self._clock() + _MAX_AGE_S
            self._num_bytes += len(text) + _ENTRY_BYTES
        while self._entries:
            text, end_s = next(iter(self._entries.values()))
            if self._num_bytes <= self._max_bytes and end_s > self._clock():
                break
            self._entries.popitem(last=False)
            self._num_bytes -= len(text) + _ENTRY_BYTES

    def find(self, client: str, item_id: str) -> dict[str, Any] | None:
        """The item; None if `client` was given none of that id, or it is not kept any more."""
        text, end_s = self._entries.get((client, item_id), ("", 0.0))
        item: dict[str, Any] | None = json.loads(text) if text and end_s > self._clock() else None
        return item
