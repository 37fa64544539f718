"""Start-up probe: is a token's result the same bits alone, in a tree, in a batch, in a long prompt?

If it is, speculation cannot change a token: verification of any tree is plain decoding, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.kv_pool import KVPool

_CONTEXT = 253  # so that the probe crosses the border of a span of attention
_NUM_ROWS = 6


def is_row_invariant(decoder: Decoder, pool: KVPool) -> bool:
    """Whether every form of pass gave the same bits.

    The pool must be unused yet: about 300 of its slots are written to. Of several ranks, rank 0 calls it while the
    others follow.
    """
    length = min(_CONTEXT, decoder.config.max_model_len - _NUM_ROWS)
    if pool.num_slots < 3 * (length + _NUM_ROWS) or length < 1:
        return False
    generator = np.random.default_rng(0)
    token_ids = generator.integers(0, decoder.config.vocab_size, length + _NUM_ROWS).tolist()
    memory = KvMemory(pool, shares_prefixes=False)
    slots = SessionSlots(memory)
    expected = _logits(decoder, memory, [_chain(slots, token_ids)], range(len(token_ids) - _NUM_ROWS, len(token_ids)))
    slots.release()
    forms = (_one_by_one(decoder, memory, token_ids), _as_tree(decoder, memory, token_ids))
    return all(torch.equal(form, expected) for form in forms)


def _chain(slots: SessionSlots, token_ids: Sequence[int]) -> Segment:
    start = slots.num_cached
    positions = range(start, start + len(token_ids))
    rows = slots.extend(len(token_ids))
    return Segment(token_ids, positions, rows, [position + 1 for position in positions], slots.by_position)


def _logits(decoder: Decoder, memory: KvMemory, segments: Sequence[Segment], rows: Sequence[int]) -> torch.Tensor:
    return decoder.forward(lay_out(segments), memory.pool, logit_rows=rows).logits.clone()


def _one_by_one(decoder: Decoder, memory: KvMemory, token_ids: Sequence[int]) -> torch.Tensor:
    """Each of the last tokens alone, every other one beside another session."""
    slots = SessionSlots(memory)
    other = SessionSlots(memory)
    first = len(token_ids) - _NUM_ROWS
    _logits(decoder, memory, [_chain(slots, token_ids[:first])], [0])
    logits = []
    for row in range(first, len(token_ids)):
        segments = [_chain(slots, token_ids[row : row + 1])]
        if row % 2:
            segments.append(_chain(other, token_ids[:3]))
        logits.append(_logits(decoder, memory, segments, [0]))
    slots.release()
    other.release()
    return torch.cat(logits)


def _as_tree(decoder: Decoder, memory: KvMemory, token_ids: Sequence[int]) -> torch.Tensor:
    """The last tokens as a path of a tree, a wrong guess beside each of them."""
    first = len(token_ids) - _NUM_ROWS
    slots = SessionSlots(memory)
    _logits(decoder, memory, [_chain(slots, token_ids[:first])], [0])
    root = _chain(slots, token_ids[first : first + 1])
    path = token_ids[first + 1 :]
    nodes = [token_id for right in path for token_id in ((right + 1) % decoder.config.vocab_size, right)]
    positions = [first + 1 + node // 2 for node in range(len(nodes))]
    tree_slots = memory.allocate(len(nodes))
    # Each node sees the right guesses before it.
    paths = [[*tree_slots[1 : node - node % 2 : 2], slot] for node, slot in enumerate(tree_slots)]
    segment = Segment(
        token_ids=[*root.token_ids, *nodes],
        positions=[*root.positions, *positions],
        slots=[*root.slots, *tree_slots],
        num_visible=[first + 1] * (1 + len(nodes)),
        slots_by_position=root.slots_by_position,
        paths=[[], *paths],
    )
    logits = _logits(decoder, memory, [segment], [0, *range(2, len(nodes) + 1, 2)])
    memory.free(tree_slots)
    slots.release()
    return logits
