"""Memory of a program's buffers, kept from pass to pass.

Dimensions: `T` rows of the pass, `S` selected rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from easyspec.ops.program import Buffer, padded_width, sizes

# Kept: making one takes as long as a small operation.
_MAX_VIEWS = 1024


class Workspace:
    """One block of float32 that only grows; programs of an executor share it, as they run one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._block = torch.zeros(0, device=device)
        self._views: dict[tuple[int, int, int, bool], torch.Tensor] = {}

    def place(self, buffers: Sequence[Buffer], num_rows: int, num_selected: int) -> list[int]:
        """Where each buffer begins in the block, which is made large enough."""
        starts = [0, *itertools.accumulate(sizes(buffers, num_rows, num_selected))]
        if starts[-1] > len(self._block):
            self._views.clear()  # they would keep the old block
            self._block = torch.zeros(_with_spare(starts[-1]), device=self._block.device)
        return starts

    @staticmethod
    def most_floats(buffers: Sequence[Buffer], num_rows: int, num_selected: int) -> int:
        """What the block comes to for passes up to this size, a smaller one that it replaces included."""
        return 2 * _with_spare(sum(sizes(buffers, num_rows, num_selected)))

    @property
    def address(self) -> int:
        return self._block.data_ptr()

    def view(self, buffer: Buffer, start: int, num_rows: int) -> torch.Tensor:
        """A buffer that begins at `start`: [num_rows, width]; its rows are `padded_width` apart."""
        # A view made in inference mode must not be written to outside of it.
        key = (start, num_rows, buffer.width, torch.is_inference_mode_enabled())
        if (found := self._views.get(key)) is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            width = padded_width(buffer.width)
            found = self._block[start : start + num_rows * width].view(num_rows, width)[:, : buffer.width]
            self._views[key] = found
        return found


def _with_spare(num_floats: int) -> int:
    return num_floats + num_floats // 4
