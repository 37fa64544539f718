"""The cost model against the rounds that the paper measured (arXiv 2502.02493, Table 2: Llama-3-70B + 8B, T = 0).

Eight A100s, base tensor-parallel over all of them, draft on one (exact) or layer-parallel with N = 4 (EasySpec), five
levels. The table gives seconds per 100 tokens; with its acceptance rates these are times of a round. The paper does not
say which A100: the 80 GB one is assumed. Context and tree size are not stated either and hardly matter there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from easyspec.parallel.layer_groups import paper_plan
from easyspec.planner.acceptance import tokens_per_round
from easyspec.planner.costs import CostModel, Load
from easyspec.planner.hardware import STACKS, device_named
from easyspec.planner.planner import draft_pass_us
from easyspec.planner.scheme import DraftScheme
from easyspec.planner.shape import KNOWN_SHAPES
from easyspec.speculation.parameters import MlpPlacement

_BASE, _DRAFT = KNOWN_SHAPES["llama-3-70b"], KNOWN_SHAPES["llama-3-8b"]
_NUM_LEVELS = 5
_CONTEXT_TOKENS = 512
_LEVEL_ROWS, _TREE_ROWS = 8, 33
_NUM_GPUS = 8


@dataclass(frozen=True)
class PaperRow:
    """One data set: seconds per 100 tokens, and accepted / drafted levels, of tree speculation and of EasySpec."""

    name: str
    tree_draft_s: float
    tree_verify_s: float
    tree_rate: float
    easyspec_draft_s: float
    easyspec_verify_s: float
    easyspec_rate: float


PAPER_TABLE_2 = (
    PaperRow("MMLU", 2.52, 1.59, 0.88, 1.70, 1.73, 0.82),
    PaperRow("HumanEval", 2.53, 1.58, 0.92, 1.61, 1.63, 0.87),
    PaperRow("MATH", 2.50, 1.47, 0.95, 1.58, 1.55, 0.91),
    PaperRow("IFEval", 2.53, 1.55, 0.89, 1.68, 1.65, 0.82),
    PaperRow("MGSM", 2.45, 1.48, 0.96, 1.55, 1.51, 0.93),
)
PAPER_TP_S = {"MMLU": 7.57, "HumanEval": 7.58, "MATH": 7.56, "IFEval": 7.55, "MGSM": 7.55}


@dataclass(frozen=True)
class Comparison:
    """A figure of the paper and the model's, both seconds per 100 tokens."""

    data: str
    figure: str
    paper_s: float
    model_s: float

    @property
    def error(self) -> float:
        """Relative; positive where the model is slower."""
        return self.model_s / self.paper_s - 1.0


def compare_with_paper() -> Iterator[Comparison]:
    """Every drafting, verification and total column, and plain tensor parallelism."""
    costs = CostModel(device_named("a100"), STACKS["paper"])
    plan = paper_plan(_DRAFT.num_layers, 4, MlpPlacement.SEQUENTIAL)
    scheme, level = DraftScheme("LP N=4 R=4", 4, plan), Load(_LEVEL_ROWS, _CONTEXT_TOKENS)
    exact_s, fuzzy_s = (
        draft_pass_us(costs, _DRAFT, scheme, level, is_calibration=is_exact) / 1e6 for is_exact in (True, False)
    )
    verify_s = costs.tensor_parallel_us(_BASE, Load(_TREE_ROWS, _CONTEXT_TOKENS), _NUM_GPUS) / 1e6
    plain_s = costs.tensor_parallel_us(_BASE, Load(1, _CONTEXT_TOKENS), _NUM_GPUS) / 1e6
    for row in PAPER_TABLE_2:
        yield Comparison(row.name, "TP", PAPER_TP_S[row.name], 100 * plain_s)
        for way, draft_s, paper_draft_s, paper_verify_s, rate in (
            ("tree", _NUM_LEVELS * exact_s, row.tree_draft_s, row.tree_verify_s, row.tree_rate),
            (
                "EasySpec",
                exact_s + (_NUM_LEVELS - 1) * fuzzy_s,
                row.easyspec_draft_s,
                row.easyspec_verify_s,
                row.easyspec_rate,
            ),
        ):
            rounds = 100 / tokens_per_round(rate, _NUM_LEVELS)
            yield Comparison(row.name, f"{way}: draft", paper_draft_s, rounds * draft_s)
            yield Comparison(row.name, f"{way}: verify", paper_verify_s, rounds * verify_s)
            yield Comparison(row.name, f"{way}: total", paper_draft_s + paper_verify_s, rounds * (draft_s + verify_s))
