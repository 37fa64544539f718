"""The sizes of draft tree that the speculation controller chooses among."""

from __future__ import annotations

from dataclasses import dataclass

from easyspec.speculation.parameters import TreeBudget


@dataclass(frozen=True)
class Arm:
    """One way to speculate; `budget` None is plain decoding."""

    name: str
    budget: TreeBudget | None

    @property
    def num_rows(self) -> int:
        """Rows a full tree takes in a verifier step, the root included."""
        return 1 + (self.budget.num_nodes if self.budget is not None else 0)

    @property
    def num_levels(self) -> int:
        return self.budget.num_levels if self.budget is not None else 0


OFF = Arm("off", None)


def arms_within(budget: TreeBudget) -> tuple[Arm, ...]:
    """Off, then trees of growing size up to `budget`.

    Node counts are one less than a power of two where `budget`'s is: with the root they fill blocks of rows.
    """
    quarter = TreeBudget(
        num_levels=max(1, (budget.num_levels + 1) // 2),
        width=max(1, budget.width // 2),
        num_nodes=max(1, (budget.num_nodes + 1) // 4 - 1),
    )
    half = TreeBudget(
        num_levels=max(1, (4 * budget.num_levels + 4) // 5),
        width=max(1, budget.width // 2),
        num_nodes=max(1, (budget.num_nodes + 1) // 2 - 1),
    )
    named = (Arm("small", quarter), Arm("medium", half), Arm("full", budget))
    seen: dict[TreeBudget, Arm] = {}
    for arm in reversed(named):  # with a small budget several are the same: keep the larger one's name
        assert arm.budget is not None
        seen.setdefault(arm.budget, arm)
    return (OFF, *reversed(seen.values()))


def within(budget: TreeBudget, cap: TreeBudget | None) -> TreeBudget:
    """`budget`, no component larger than `cap`'s."""
    if cap is None:
        return budget
    return TreeBudget(
        min(budget.num_levels, cap.num_levels), min(budget.width, cap.width), min(budget.num_nodes, cap.num_nodes)
    )


def deepened(budget: TreeBudget) -> TreeBudget:
    """As many nodes in a narrower tree of twice the levels: for text that the drafter foresees entirely."""
    return TreeBudget(min(64, 2 * budget.num_levels), max(1, budget.width // 2), budget.num_nodes)
