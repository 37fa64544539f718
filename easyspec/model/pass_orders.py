"""How rank 0 leads: before each of its passes it tells the others, in one broadcast, what to compute.

Only the device's part is shared. Sessions, slots, trees and choices exist on rank 0 alone, so nothing that it decides
by the clock or by load can make the ranks diverge.
"""

from __future__ import annotations

import enum
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from easyspec.model.row_layout import Segment
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.split_choice import NO_ROWS, SplitRows


class Order(enum.Enum):
    """What followers do when there is no pass."""

    STAY = "stay"
    LEAVE = "leave"


@dataclass(frozen=True)
class PassOrder:
    """A forward pass, the rows that the head gives logits for, and the rows that it chooses tokens at.

    `keeps_hidden`: more logits of this pass may be asked for by a HeadOrder.
    """

    segments: tuple[Segment, ...]
    plan: LayerPlan
    logit_rows: tuple[int, ...]
    choice_rows: SplitRows = NO_ROWS
    keeps_hidden: bool = False


@dataclass(frozen=True)
class HeadOrder:
    """The head, applied to further rows of the last pass."""

    logit_rows: tuple[int, ...]


def encode_order(order: PassOrder | HeadOrder | Order) -> bytes:
    """Bytes for `Ranks.share`; they come from our own rank 0 over the group's own connections, hence pickle."""
    if not isinstance(order, PassOrder):
        return pickle.dumps(order)
    segments = tuple(_compact(segment) for segment in order.segments)
    return pickle.dumps(replace(order, segments=segments), protocol=pickle.HIGHEST_PROTOCOL)


def decode_order(payload: bytes) -> PassOrder | HeadOrder | Order:
    """What `encode_order` was given; slots that no row sees are cut off."""
    order: PassOrder | HeadOrder | Order = pickle.loads(payload)
    return order


def _compact(segment: Segment) -> Segment:
    return Segment(
        token_ids=_narrow(segment.token_ids),
        positions=_narrow(segment.positions),
        slots=_narrow(segment.slots),
        num_visible=_narrow(segment.num_visible),
        # Of committed positions that some row sees: the others would be sent for nothing.
        slots_by_position=np.ascontiguousarray(segment.slots_by_position[: max(segment.num_visible)]),
        paths=[_narrow(path) for path in segment.paths],
    )


def _narrow(values: Sequence[int]) -> list[int]:
    return [int(value) for value in values]
