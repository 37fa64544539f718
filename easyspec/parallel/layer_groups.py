"""Which decoder layers run at the same time (EasySpec, arXiv 2502.02493, section 3)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import MlpPlacement

LayerGroup = range  # consecutive layers


@dataclass(frozen=True)
class LayerPlan:
    """Groups of consecutive layers, together all layers in order, and where a group's MLPs run.

    A plan of single layers is ordinary sequential execution.
    """

    groups: tuple[LayerGroup, ...]
    mlp: MlpPlacement = MlpPlacement.SEQUENTIAL

    def __post_init__(self) -> None:
        # Plans are looked up in every pass, and hashing dozens of ranges takes longer than a small layer.
        object.__setattr__(self, "_hash", hash((self.groups, self.mlp)))

    def __hash__(self) -> int:
        return int(self.__dict__["_hash"])

    @property
    def num_layers(self) -> int:
        return self.groups[-1].stop

    @property
    def is_sequential(self) -> bool:
        return len(self.groups) == self.num_layers

    def cut_at(self, depths: Sequence[int]) -> LayerPlan:
        """The same plan with borders after so many layers: groups that straddle one are cut at it.

        Pieces of groups that were cut join where no border parts them, up to the plan's largest group.
        """
        most = max(len(group) for group in self.groups)
        groups: list[LayerGroup] = []
        is_piece = False  # whether the last of `groups` is one
        for group in self.groups:
            borders = [group.start, *(depth for depth in depths if group.start < depth < group.stop), group.stop]
            for start, stop in itertools.pairwise(borders):
                was_piece, is_piece = is_piece, len(borders) > 2
                if was_piece and is_piece and start not in depths and stop - groups[-1].start <= most:
                    groups[-1] = range(groups[-1].start, stop)
                else:
                    groups.append(range(start, stop))
        return LayerPlan(tuple(groups), self.mlp)

    def __str__(self) -> str:
        return " | ".join(
            str(group.start) if len(group) == 1 else f"{group.start}-{group.stop - 1}" for group in self.groups
        )


def sequential_plan(num_layers: int) -> LayerPlan:
    return LayerPlan(tuple(range(layer, layer + 1) for layer in range(num_layers)))


def paper_plan(num_layers: int, layer_parallel_size: int, mlp: MlpPlacement) -> LayerPlan:
    """The paper's rule: first and last layer alone, between them 1..N-1, N..2N-1, ..., and a smaller rest.

    Raises InvalidRequestError if `layer_parallel_size` is not in 1..num_layers.
    """
    if not 1 <= layer_parallel_size <= num_layers:
        raise InvalidRequestError("layer_parallel_size", layer_parallel_size, f"1 to {num_layers}, the draft's layers")
    if layer_parallel_size == 1:
        return sequential_plan(num_layers)
    borders = [0, 1, *range(layer_parallel_size, num_layers - 1, layer_parallel_size), num_layers - 1, num_layers]
    borders = sorted(set(borders))
    groups = tuple(range(start, stop) for start, stop in itertools.pairwise(borders))
    return LayerPlan(groups, mlp)


def parse_plan(text: str, num_layers: int, mlp: MlpPlacement) -> LayerPlan:
    """Read an explicit list such as `0 | 1-3 | 4-7 | 8`; raises InvalidRequestError naming the part at fault."""
    groups: list[LayerGroup] = []
    for part in text.split("|"):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        expected = groups[-1].stop if groups else 0
        if match is None or int(match[1]) != expected or int(match[2] or match[1]) < expected:
            raise InvalidRequestError("layer_groups", part.strip(), f"FIRST or FIRST-LAST with FIRST = {expected}")
        groups.append(range(expected, int(match[2] or match[1]) + 1))
    if groups[-1].stop != num_layers:
        raise InvalidRequestError("layer_groups", text, f"every layer from 0 to {num_layers - 1}, in order")
    return LayerPlan(tuple(groups), mlp)
