"""What programs hold of a weight: its shape, and whatever its executor made of it."""

from __future__ import annotations

from typing import Protocol


class PackedWeight(Protocol):
    """A matrix [num_outputs, num_inputs] in its executor's own layout."""

    @property
    def num_outputs(self) -> int: ...
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def format_name(self) -> str: ...
