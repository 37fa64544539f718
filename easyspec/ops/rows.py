"""The rows of a pass: tokens, positions, slots, and what each of them sees.

Dimensions: `T` rows, `B` segments, `X` extra slots of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True)  # not frozen: two a pass
class PassRows:
    """A row sees positions 0, 1, 2, ...: first `num_committed` slots of its segment's text, then its own extra ones.

    token_ids, positions (which the rotary embedding reads), segment_of_row, num_committed: int32 [T]; slots: int64
    [T], where keys and values go. committed: of each segment its slots by position, int64. extra: int64 [X], row t has
    those from first_extra[t] to first_extra[t + 1]. selected: the rows that get logits.
    """

    token_ids: Int32Array
    positions: Int32Array
    slots: Int64Array
    segment_of_row: Int32Array
    num_committed: Int32Array
    committed: Sequence[Int64Array]
    extra: Int64Array
    first_extra: Int32Array
    selected: Int32Array

    def __len__(self) -> int:
        return len(self.token_ids)

    def seen_slots(self, row: int) -> Int64Array:
        """Slots of the positions that a row sees, in their order."""
        own = self.committed[self.segment_of_row[row]][: self.num_committed[row]]
        return np.concatenate([own, self.extra[self.first_extra[row] : self.first_extra[row + 1]]])
