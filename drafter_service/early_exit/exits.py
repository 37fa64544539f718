"""Drafting by early exit (S2D, arXiv 2407.01955) over layer-parallel groups.

Every level of a tree runs the layers up to the first exit; there, and at each further exit, a gate says whether its
candidates are good enough or the pass goes on. What left early has no K and V in the layers below. It is kept as hidden
states and caught up only when a later level of the same session goes that deep (*lazy catch-up*): first the committed
tokens, exactly, then those nodes of the tree that the level's rows descend from, by the layer plan. So whatever a row's
attention reads at any layer was written there, and committed tokens are exact in every layer that they have come to.

A calibration is the same thing without the tree: an exact pass over the new tokens as deep as its level goes. The
layers below it repair nothing that is read, and wait.

Sessions of a batch go down together; a session that has left holds no row in what follows.

Dimensions: `E` hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from drafter_service.early_exit.gate import ExitGate, LevelView, Stage
from drafter_service.model.batch import fitting
from drafter_service.model.exit_state import ExitState, Look
from drafter_service.model.growth import Candidates
from drafter_service.model.ranking import rank_level
from drafter_service.model.state import ModelState
from easyspec.model.decoder import Decoder
from easyspec.model.row_layout import RowLayout, Segment, lay_out
from easyspec.ops.kv_pool import KVPool
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.growing_tree import follow

_NS = 1e-9
# Committed tokens that may wait for the deeper layers. One pass over so many costs less than the passes that they were
# spared, and a session that always leaves early must not gather more and more of them.
MAX_WAITING = 64


@dataclass
class _Level:
    """One session's next level on its way down: `rows` of the tree to expand ((0,): the last committed token), and the
    hidden states [rows, E] that they have come to. `seen` has what each exit so far said about the rows."""

    state: ModelState
    exits: ExitState
    rows: tuple[int, ...]
    hidden: torch.Tensor
    seen: list[list[Candidates]] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        return self.rows == (0,)

    def view(self) -> LevelView:
        """What the gate looks at."""
        tree = self.state.growing
        reach = sum(math.exp(tree.log_values[row]) for row in self.rows)
        return LevelView(self.confidences[-1], min(1.0, reach), tree.level + 1, self.state.request.target)

    def look(self, candidates: list[Candidates]) -> None:
        """Take note of what an exit says; confidence is the best candidates' probability, rows weighed by theirs."""
        tree, sharpness = self.state.growing, self.state.sharpness.value
        weights = [math.exp(tree.log_values[row]) for row in self.rows]
        best = [math.exp(c.log_probabilities(sharpness)[0]) if c.scores else 1.0 for c in candidates]
        weighed = sum(weight * value for weight, value in zip(weights, best, strict=True))
        self.seen.append(candidates)
        self.confidences.append(weighed / max(sum(weights), 1e-30))


class EarlyExits:
    """Runs levels of sessions that may leave early; their states have `exits`."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        gate: ExitGate,
        max_batch_rows: int = 512,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._gate = gate
        self._max_batch_rows = max_batch_rows
        self._clock_ns = clock_ns
        self._layouts: dict[tuple[tuple[int, ...], ...], RowLayout] = {}

    def learn(self, state: ModelState) -> None:
        """Tell the gate what became of the last tree; to be called before the session begins another."""
        exits = _exits(state)
        now_ns = self._clock_ns()
        if exits.began_ns is not None and exits.looks:
            num_right = 0
            said = state.said_since
            for row, token_id, child in follow(state.growing, said):
                if row not in exits.looks:
                    break
                self._gate.observe_choice(state.request.target, exits.looks[row], token_id)
                num_right += child is not None
            elapsed_s = (now_ns - exits.began_ns) * _NS
            self._gate.observe_round(state.request.target, elapsed_s, len(said), num_right)
        exits.began_ns = now_ns

    def calibrate(self, chains: Sequence[tuple[ModelState, Segment]], plan: LayerPlan) -> None:
        """A pass over new committed tokens, as deep as the first level of each tree goes; adds that level.

        `plan` is the sequential one, but for sessions that are to do without calibration.
        """
        started_ns = self._clock_ns()
        self._layouts.clear()
        segments = [segment for _, segment in chains]
        hidden = self._run(segments, plan, range(_exits(chains[0][0]).exits[0]))
        levels = []
        for (state, _), part in zip(chains, hidden, strict=True):
            exits = _exits(state)
            exits.arrive(0, part)
            levels.append(_Level(state, exits, (0,), part[-1:]))
        self._go_down(levels, plan)
        for state, _ in chains:
            exits = _exits(state)
            is_exact = state.request.calibration and plan == self._decoder.sequential_plan
            if is_exact and exits.is_whole_asked:
                state.num_exact = state.slots.num_cached - exits.num_waiting
            assert state.drafting is not None, "a round is under way"
            state.drafting.is_calibrated = True
            state.drafting.calibrate_ns += self._clock_ns() - started_ns

    def grow(self, frontiers: Sequence[tuple[ModelState, Segment]], plan: LayerPlan) -> None:
        """One fuzzy pass over the frontiers, each as deep as its gates say, and the level that it gives."""
        started_ns = self._clock_ns()
        self._layouts.clear()
        segments = [segment for _, segment in frontiers]
        hidden = self._run(segments, plan, range(_exits(frontiers[0][0]).exits[0]))
        levels = [
            _Level(state, _exits(state), tuple(state.growing.frontier), part)
            for (state, _), part in zip(frontiers, hidden, strict=True)
        ]
        self._go_down(levels, plan)
        for state, _ in frontiers:
            assert state.drafting is not None, "a round is under way"
            state.drafting.num_fuzzy_steps += 1
            state.drafting.fuzzy_ns += self._clock_ns() - started_ns

    def _go_down(self, levels: Sequence[_Level], plan: LayerPlan) -> None:
        """From exit to exit until all levels have left."""
        exit_index = 0
        self._look(levels)
        while levels := self._who_goes_on(levels, exit_index):
            started_ns = self._clock_ns()
            stage = _stage(levels, exit_index)
            self._descend(levels, exit_index, plan)
            self._look(levels)
            self._gate.observe_stage(stage, (self._clock_ns() - started_ns) * _NS)
            exit_index += 1

    def _look(self, levels: Sequence[_Level]) -> None:
        logits = self._decoder.logits(torch.cat([level.hidden for level in levels]))
        ranked = rank_level(self._decoder.executor, [level.state for level in levels], logits)
        for level, candidates in zip(levels, ranked, strict=True):
            level.look(candidates)

    def _who_goes_on(self, levels: Sequence[_Level], exit_index: int) -> list[_Level]:
        """Let the others leave, with the candidates that they have."""
        may = [level for level in levels if exit_index < level.exits.last_exit]
        wished = self._gate.goes_on(_stage(may, exit_index), [level.view() for level in may]) if may else []
        going = [
            level
            for level, is_wished in zip(may, wished, strict=True)
            if is_wished or level.exits.num_waiting_at(exit_index) >= MAX_WAITING
        ]
        for level in levels:
            if level not in going:
                _leave(level, exit_index)
        return going

    def _descend(self, levels: Sequence[_Level], exit_index: int, plan: LayerPlan) -> None:
        """From one exit to the next: committed tokens that wait there, exactly; then nodes, by the plan."""
        exits = levels[0].exits.exits
        layers = range(exits[exit_index], exits[exit_index + 1])
        behind = [level for level in levels if level.exits.num_waiting_at(exit_index) > 0]
        if behind:
            waiting = [level.exits.waiting_hidden(exit_index) for level in behind]
            segments = [_committed_segment(level, exit_index) for level in behind]
            arrived = self._run(segments, self._decoder.sequential_plan, layers, torch.cat(waiting))
            for level, part in zip(behind, arrived, strict=True):
                level.exits.arrive(exit_index + 1, part)
                if level.is_first:
                    level.hidden = part[-1:]
        growing = [level for level in levels if not level.is_first]
        if growing:
            self._descend_nodes(growing, exit_index, layers, plan)

    def _descend_nodes(self, levels: Sequence[_Level], exit_index: int, layers: range, plan: LayerPlan) -> None:
        """The levels' rows, and those they descend from that wait at the exit."""
        ancestors = [level.exits.nodes_at(exit_index, _ancestors(level)) for level in levels]
        hidden = [
            torch.cat([*(level.exits.node_hidden(row)[None] for row in rows), level.hidden])
            for level, rows in zip(levels, ancestors, strict=True)
        ]
        segments = [
            level.state.node_segment([*rows, *level.rows]) for level, rows in zip(levels, ancestors, strict=True)
        ]
        arrived = self._run(segments, plan, layers, torch.cat(hidden))
        for level, rows, part in zip(levels, ancestors, arrived, strict=True):
            level.exits.nodes_arrive(exit_index + 1, rows, part[: len(rows)])
            level.hidden = part[len(rows) :]

    def _run(
        self, segments: Sequence[Segment], plan: LayerPlan, layers: range, hidden: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """What each segment's rows, of a session each, come to at the end of `layers`; in passes of bounded size."""
        entrances = [None] * len(segments) if hidden is None else torch.split(hidden, [len(each) for each in segments])
        waiting, arrived = [*zip(segments, entrances, strict=True)], list[torch.Tensor]()
        while waiting:
            part = fitting(waiting, lambda each: len(each[0]), self._max_batch_rows)
            waiting = waiting[len(part) :]
            inside = [segment for segment, _ in part]
            # Within a level the same slots are the same rows, which see the same: only the first stage lays them out.
            key = tuple(tuple(segment.slots) for segment in inside)
            if key not in self._layouts:
                self._layouts[key] = lay_out(inside)
            known = [entrance for _, entrance in part if entrance is not None]
            come = self._decoder.forward_between(
                self._layouts[key], self._pool, plan, layers, torch.cat(known) if known else None
            )
            arrived += torch.split(come, [len(segment) for segment in inside])
        return arrived


def _exits(state: ModelState) -> ExitState:
    assert state.exits is not None, "a session that may leave early"
    return state.exits


def _stage(levels: Sequence[_Level], exit_index: int) -> Stage:
    is_first = levels[0].is_first
    catches_up = not is_first and any(level.exits.num_waiting_at(exit_index) for level in levels)
    return Stage(exit_index, is_first, catches_up)


def _leave(level: _Level, exit_index: int) -> None:
    """Make the last exit's candidates the next level of the tree."""
    exits = level.exits
    if not level.is_first:
        exits.nodes_arrive(exit_index, level.rows, level.hidden)
    for index, row in enumerate(level.rows):
        exits.exit_of_row[row] = exit_index
        exits.looks[row] = [
            Look(confidence, candidates[index].token_ids[: exits.num_counted])
            for confidence, candidates in zip(level.confidences, level.seen, strict=True)
        ]
    level.state.growing.add_level(level.seen[-1])


def _ancestors(level: _Level) -> list[int]:
    """Rows between the root and the level's rows, parents first."""
    parent_rows = level.state.growing.parent_rows
    found: set[int] = set()
    for row in level.rows:
        above = parent_rows[row - 1]
        while above > 0 and above not in found:
            found.add(above)
            above = parent_rows[above - 1]
    return sorted(found)


def _committed_segment(level: _Level, exit_index: int) -> Segment:
    """Rows for the committed tokens that wait at an exit."""
    state = level.state
    return state.committed_segment(level.exits.waiting_positions(exit_index, state.slots.num_cached))
