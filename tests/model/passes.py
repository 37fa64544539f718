"""Passes over a decoder, put together as the engines do it: prompts, single tokens and trees in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from easyspec.model.config import ModelConfig, load_config
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.rope import rotary_tables
from easyspec.model.row_layout import Segment, lay_out
from easyspec.model.weight_reader import WeightFormat
from easyspec.model.weight_source import open_weights
from easyspec.ops.executor import Executor, choose_executor
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.program import Rotary
from easyspec.ops.rows import Int64Array
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.speculation.token_tree import TokenTree

CPU = torch.device("cpu")


class Session:
    """Cached tokens of one text, and the slots of one tree behind them."""

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self.slots = SessionSlots(memory)
        self._tree_slots: list[int] = []

    def chain(self, token_ids: Sequence[int]) -> Segment:
        """Rows that extend the text."""
        start, count = self.slots.num_cached, len(token_ids)
        rows = self.slots.extend(count)
        visible = range(start + 1, start + count + 1)
        return Segment(token_ids, range(start, start + count), rows, visible, self.slots.by_position)

    def tree(self, root_token_id: int, tree: TokenTree) -> Segment:
        """A row that extends the text, and a tree of guesses behind it."""
        root = self.chain([root_token_id])
        nodes, base = len(tree), self.slots.num_cached
        positions = [base - 1 + depth for depth in tree.row_depths[1:]]
        self._tree_slots = self._memory.allocate(nodes)
        return Segment(
            token_ids=[root_token_id, *tree.token_ids],
            positions=[base - 1, *positions],
            slots=[*root.slots, *self._tree_slots],
            num_visible=[base] * (nodes + 1),
            slots_by_position=self.slots.by_position,
            paths=[[self._tree_slots[seen - 1] for seen in tree.path_rows(row)] for row in range(nodes + 1)],
        )

    def drop_tree(self) -> None:
        """Forget the tree and its root."""
        self._memory.free(self._tree_slots)
        self._tree_slots = []
        self.slots.truncate(self.slots.num_cached - 1)

    def close(self) -> None:
        self._memory.free(self._tree_slots)
        self._tree_slots = []
        self.slots.release()


class Passes:
    """A decoder over a checkpoint and its KV memory."""

    def __init__(
        self,
        folder: Path,
        *,
        executor: str | Executor = "auto",
        dtype: str = "auto",
        weights: WeightFormat = WeightFormat.AUTO,
        num_slots: int = 2000,
        ranks: Ranks = SINGLE_RANK,
        placement: RankPlacement = RankPlacement.TENSOR,
    ) -> None:
        self.config = load_config(folder, dtype)
        if isinstance(executor, str):
            executor = choose_executor(executor, CPU, num_threads=1)
        self.decoder = Decoder(
            folder,
            self.config,
            executor,
            ranks=ranks,
            placement=placement,
            weights=weights,
            open_tensors=open_weights,
        )
        self.pool = self.decoder.new_pool(num_slots)
        self.memory = KvMemory(self.pool, shares_prefixes=False)

    def open(self) -> Session:
        return Session(self.memory)

    @torch.inference_mode()
    def run(self, *segments: Segment, plan: LayerPlan | None = None) -> list[torch.Tensor]:
        """One pass; the logits of every segment's rows."""
        layout = lay_out(segments)
        counts = [len(segment) for segment in segments]
        rows = [layout.flat_row(index, row) for index, count in enumerate(counts) for row in range(count)]
        return list(self.decoder.forward(layout, self.pool, plan, rows).logits.clone().split(counts))

    def prefill(self, token_ids: Sequence[int], plan: LayerPlan | None = None) -> torch.Tensor:
        """Logits of a whole text in one pass; leaves no slot behind."""
        session = self.open()
        (logits,) = self.run(session.chain(token_ids), plan=plan)
        session.close()
        return logits


def rotary_table(config: ModelConfig) -> Rotary:
    """The angles of a model whose layers all turn alike."""
    (table,) = rotary_tables(config, CPU).values()
    return table


def cached(pool: KVPool, slots: Int64Array) -> torch.Tensor:
    """Keys and values in some slots, [L * H, slots, D + D]."""
    index = torch.from_numpy(slots)
    return torch.cat([plane[:, :, index, : pool.head_dim].flatten(0, 1) for plane in (pool.keys, pool.values)], dim=-1)


def random_token_ids(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def random_tree(num_nodes: int, vocab_size: int, seed: int, path: Sequence[int] = ()) -> tuple[TokenTree, list[int]]:
    """A tree of random shape with distractors before, between and behind the nodes of `path`, and the path's rows."""
    rng = np.random.default_rng(seed)
    places = set(rng.choice(num_nodes, size=len(path), replace=False).tolist())
    token_ids: list[int] = []
    parent_rows: list[int] = []
    path_rows = [0]
    for node in range(num_nodes):
        is_on_path = node in places
        parent_row = path_rows[-1] if is_on_path else int(rng.integers(0, node + 1))
        taken = {token for token, parent in zip(token_ids, parent_rows, strict=True) if parent == parent_row}
        if parent_row in path_rows[: len(path)]:  # no distractor may take the place of the right child
            taken.add(path[path_rows.index(parent_row)])
        wrong = [token for token in range(vocab_size) if token not in taken]
        token_ids.append(path[len(path_rows) - 1] if is_on_path else int(rng.choice(wrong)))
        parent_rows.append(parent_row)
        if is_on_path:
            path_rows.append(node + 1)
    return TokenTree(tuple(token_ids), tuple(parent_rows)), path_rows
