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

    def leave(self, exit_index: int) -> None:
        """Make the last exit's candidates the next level of the tree."""
        if not self.is_first:
            self.exits.nodes_arrive(exit_index, self.rows, self.hidden)
        for index, row in enumerate(self.rows):
            self.exits.exit_of_row[row] = exit_index
            self.exits.looks[row] = [
                Look(confidence, candidates[index].token_ids[: self.exits.num_counted])
                for confidence, candidates in zip(self.confidences, self.seen, strict=True)
            ]
        self.state.growing.add_level(self.seen[-1])

    def ancestors_at(self, exit_index: int) -> list[int]:
        """Rows between the root and the level's rows that wait at an exit, parents first."""
        tree, nodes = self.state.growing, self.exits.nodes
        above = {row for below in self.rows for row in tree.path_rows(below)[:-1]}
        return sorted(row for row in above if row in nodes and nodes[row][0] == exit_index)


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
        exits, now_ns, said = _exits(state), self._clock_ns(), state.said_since
        if exits.began_ns is not None and exits.looks:
            num_right = 0
            for row, token_id, child in follow(state.growing, said):
                if row not in exits.looks:
                    break
                self._gate.observe_choice(state.request.target, exits.looks[row], token_id)
                num_right += child is not None
            elapsed_s = (now_ns - exits.began_ns) * _NS
            self._gate.observe_round(state.request.target, elapsed_s, len(said), num_right)
        exits.began_ns = now_ns

    def run(self, members: Sequence[tuple[ModelState, Segment]], plan: LayerPlan) -> None:
        """Run the rows of sessions as deep as the gate says, and add the levels that they give: all of the members are
        at their first level, whose rows are new committed tokens, or none is.

        `plan` is the sequential one for a first level, but for sessions that are to do without calibration.
        """
        self._layouts.clear()
        first_exit = range(_exits(members[0][0]).exits[0])
        levels = []
        for (state, _), hidden in zip(members, self._pass([s for _, s in members], plan, first_exit), strict=True):
            level = _Level(state, _exits(state), tuple(state.growing.frontier), hidden)
            if level.is_first:
                level.exits.arrive(0, hidden)
                level.hidden = hidden[-1:]
            levels.append(level)
        self._look(levels)
        going, exit_index = self._going_on(levels, 0), 0
        while going:
            started_ns = self._clock_ns()
            stage = _stage(going, exit_index)
            self._descend(going, exit_index, plan)
            self._look(going)
            self._gate.observe_stage(stage, (self._clock_ns() - started_ns) * _NS)
            exit_index += 1
            going = self._going_on(going, exit_index)
        for level in levels:
            state, exits = level.state, level.exits
            is_exact = state.request.calibration and plan == self._decoder.sequential_plan
            if level.is_first and is_exact and exits.is_whole_asked:
                state.num_exact = state.slots.num_cached - exits.num_waiting

    def _look(self, levels: Sequence[_Level]) -> None:
        logits = self._decoder.logits(torch.cat([level.hidden for level in levels]))
        ranked = rank_level(self._decoder.executor, [level.state for level in levels], logits)
        for level, candidates in zip(levels, ranked, strict=True):
            level.look(candidates)

    def _going_on(self, levels: Sequence[_Level], exit_index: int) -> list[_Level]:
        """The levels that go on; the others leave, with the candidates that they have."""
        may = [level for level in levels if exit_index < level.exits.last_exit]
        wished = self._gate.goes_on(_stage(may, exit_index), [level.view() for level in may]) if may else []
        going = [
            level
            for level, is_wished in zip(may, wished, strict=True)
            if is_wished or level.exits.num_waiting_at(exit_index) >= MAX_WAITING
        ]
        for level in levels:
            if level not in going:
                level.leave(exit_index)
        return going

    def _descend(self, levels: Sequence[_Level], exit_index: int, plan: LayerPlan) -> None:
        """From one exit to the next: committed tokens that wait there, exactly; then the levels' rows and those they
        descend from that wait there, by the plan."""
        exits = levels[0].exits.exits
        layers = range(exits[exit_index], exits[exit_index + 1])
        behind = [level for level in levels if level.exits.num_waiting_at(exit_index) > 0]
        if behind:
            waiting = torch.cat([level.exits.committed[exit_index] for level in behind])
            segments = [
                level.state.committed_segment(level.exits.waiting_positions(exit_index, level.state.slots.num_cached))
                for level in behind
            ]
            arrived = self._pass(segments, self._decoder.sequential_plan, layers, waiting)
            for level, part in zip(behind, arrived, strict=True):
                level.exits.arrive(exit_index + 1, part)
                if level.is_first:
                    level.hidden = part[-1:]
        growing = [(level, level.ancestors_at(exit_index)) for level in levels if not level.is_first]
        if not growing:
            return
        hidden = [
            torch.cat([*(level.exits.nodes[row][1][None] for row in above), level.hidden]) for level, above in growing
        ]
        segments = [level.state.node_segment([*above, *level.rows]) for level, above in growing]
        arrived = self._pass(segments, plan, layers, torch.cat(hidden))
        for (level, above), part in zip(growing, arrived, strict=True):
            level.exits.nodes_arrive(exit_index + 1, above, part[: len(above)])
            level.hidden = part[len(above) :]

    def _pass(
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
