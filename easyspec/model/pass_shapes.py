"""The shapes that captured passes come in: what a pass is padded to so that it can be replayed.

A shape is a rectangle: so many segments of so many rows each, each reading so many blocks of its text. All rows of the
rectangle are rows of the pass. The ladder is coarse where padding is nearly free on a GPU (rows up to about a hundred,
blocks of few sessions) and ends where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from easyspec.model.row_layout import BLOCK_SIZE, MAX_TREE_COLUMNS, Segment, count_blocks

# A block's committed columns and room for the largest tree: as many as the exact sums allow (docs/decisions/0003).
NUM_COLUMNS = BLOCK_SIZE + MAX_TREE_COLUMNS
# Products of fewer rows have other bits; powers of two from here on are buckets of the eager layout too.
_FEWEST_ROWS = 4
_BLOCK_FACTOR = 4


@dataclass(frozen=True)
class PassShape:
    """`num_segments` times `rows_per_segment` rows; each segment reads `num_blocks` blocks of 128 positions."""

    num_segments: int
    rows_per_segment: int
    num_blocks: int

    @property
    def num_rows(self) -> int:
        return self.num_segments * self.rows_per_segment

    @property
    def total_blocks(self) -> int:
        return self.num_segments * self.num_blocks

    @property
    def cost(self) -> tuple[int, int, int]:
        """Orders shapes: rows first, as they go through all weights."""
        return self.num_rows, self.total_blocks, self.num_segments


@dataclass(frozen=True)
class ShapeLimits:
    """The largest captured passes: `max_rows` of all segments, `max_blocks` of all segments, both padded.

    128 rows of an 8B model should compute for less time than its weights take to read on a current GPU. 256 blocks are
    32 768 tokens of context; the copies that attention makes of them are what captures hold most memory for.
    """

    max_rows: int = 128
    max_blocks: int = 256


DEFAULT_SHAPE_LIMITS = ShapeLimits()


def shape_ladder(
    limits: ShapeLimits, *, most_rows_per_segment: int, max_model_len: int, num_queries_per_kv: int
) -> tuple[PassShape, ...]:
    """All shapes within the limits, the cheapest first; segments of up to `most_rows_per_segment` rows have one."""
    fewest = _FEWEST_ROWS // math.gcd(_FEWEST_ROWS, num_queries_per_kv)
    shapes = [
        PassShape(num_segments, rows, blocks)
        for rows in sorted({fewest, *_doublings(_FEWEST_ROWS, most_rows_per_segment)})
        for num_segments in _doublings(1, limits.max_rows // rows)
        for blocks in _block_counts(min(-(-max_model_len // BLOCK_SIZE), limits.max_blocks))
    ]
    kept = [
        shape
        for shape in shapes
        if _FEWEST_ROWS <= shape.num_rows <= limits.max_rows and shape.total_blocks <= limits.max_blocks
    ]
    return tuple(sorted(kept, key=lambda shape: shape.cost))


def fitting_shape(shapes: Iterable[PassShape], segments: Sequence[Segment]) -> PassShape | None:
    """The first of `shapes`, which stand in order of their cost, that holds these segments; None if there is none."""
    if any(segment.tree is not None and len(segment.tree.slots) > MAX_TREE_COLUMNS for segment in segments):
        return None
    most_rows = max(len(segment) for segment in segments)
    most_blocks = max(count_blocks(segment) for segment in segments)
    return next(
        (
            shape
            for shape in shapes
            if shape.num_segments >= len(segments)
            and shape.rows_per_segment >= most_rows
            and shape.num_blocks >= most_blocks
        ),
        None,
    )


def _doublings(first: int, last: int) -> list[int]:
    """first, 2 x first, ... up to the first that is not below `last`; none if `last` is 0."""
    counts = [first] if last > 0 else []
    while counts and counts[-1] < last:
        counts.append(2 * counts[-1])
    return counts


def _block_counts(most: int) -> list[int]:
    """1, 4, 16, ..., the last one not below `most`."""
    counts = [1]
    while counts[-1] < most:
        counts.append(counts[-1] * _BLOCK_FACTOR)
    return counts
