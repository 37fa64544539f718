"""Several ranks compute what one does: logits to 1e-4 (they reach 5 to 12), with the planned number of collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, sequential_plan
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import SINGLE_RANK, GroupRanks, Ranks, SingleRank, join_group
from easyspec.speculation.parameters import MlpPlacement
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS
from tests.model.passes import CPU, Passes, random_token_ids, random_tree
from tests.parallel.rank_runner import run_ranks

TOLERANCE = 1e-4
NUM_LAYERS = 6
# Families with norms behind a sum over ranks, parallel layers, experts, biases of experts, and sinks.
PECULIAR = ("gemma2", "cohere2", "qwen3_moe", "gpt_oss", "granite")


def _of_layers(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same for more layers."""
    types = options.get("layer_types")
    return {**options, **({} if types is None else {"layer_types": [*types, *types]})}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with one KV head": {"num_key_value_heads": 1},
    "llama, tied, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 341},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    **{name: {"model_type": name, **_of_layers(FAMILY_OPTIONS[name])} for name in PECULIAR},
}
EXECUTORS = ("native", "reference")
TOKEN_IDS = random_token_ids(150, VOCAB_SIZE)
TREE, _ = random_tree(11, VOCAB_SIZE, seed=5)


@dataclass(frozen=True)
class Computed:
    """Logits of every pass, and the collectives that each pass took on this rank."""

    logits: list[torch.Tensor]
    collectives: list[Counter[str]]


def compute(folder: Path, ranks: Ranks, placement: RankPlacement, plan: LayerPlan | None, executor: str) -> Computed:
    """A prompt, a tree of guesses beside another prompt, and single tokens; followers compute their part."""
    passes = Passes(folder, executor=executor, ranks=ranks, placement=placement)
    if ranks.rank > 0:
        with torch.inference_mode():
            passes.decoder.follow(passes.pool)
        return Computed([], [])
    logits: list[torch.Tensor] = []
    collectives: list[Counter[str]] = []

    def run(*segments: Any) -> None:
        before = Counter(ranks.num_collectives) if isinstance(ranks, GroupRanks) else Counter()
        logits.extend(passes.run(*segments, plan=plan))
        if isinstance(ranks, GroupRanks):
            collectives.append(Counter(ranks.num_collectives) - before)

    first, second = passes.open(), passes.open()
    run(first.chain(TOKEN_IDS[:100]))
    run(first.tree(TOKEN_IDS[100], TREE), second.chain(TOKEN_IDS[100:140]))
    first.drop_tree()
    passes.decoder.keep_followers()
    run(first.chain(TOKEN_IDS[100:101]), second.chain(TOKEN_IDS[140:141]))
    passes.decoder.dismiss_followers()
    return Computed(logits, collectives)


def compute_all(cases: list[tuple[Path, RankPlacement, LayerPlan | None, str]]) -> list[Computed]:
    ranks = join_group(CPU, timeout_s=60)
    return [compute(folder, ranks, placement, plan, executor) for folder, placement, plan, executor in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS, **options)
        for name, options in FAMILIES.items()
    }


def assert_same(computed: Computed, expected: Computed) -> None:
    for ours, theirs in zip(computed.logits, expected.logits, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tensor_parallel_ranks_compute_what_one_does(folders: dict[str, Path], num_ranks: int) -> None:
    cases: Any = [
        (folder, RankPlacement.TENSOR, None, executor) for folder in folders.values() for executor in EXECUTORS
    ]
    led, *followers = run_ranks(num_ranks, compute_all, cases)
    assert all(computed.logits == [] for follower in followers for computed in follower)
    for computed, (folder, *case) in zip(led, cases, strict=True):
        assert_same(computed, compute(folder, SINGLE_RANK, *case))
        # The order, an all-reduce after attention and one after the MLP of every layer, the shares of the vocabulary.
        assert computed.collectives == [{"share": 1, "sum": 2 * NUM_LAYERS, "gather": 1}] * 3


def layer_cases(folder: Path) -> list[tuple[Path, RankPlacement, LayerPlan, str]]:
    return [
        (folder, placement, paper_plan(NUM_LAYERS, size, mlp), executor)
        for size, executor in zip((3, 4), EXECUTORS, strict=True)
        for placement, mlp in (
            (RankPlacement.LAYERS, MlpPlacement.SEQUENTIAL),
            (RankPlacement.LAYERS_SHARDED_MLP, MlpPlacement.SEQUENTIAL),
            (RankPlacement.LAYERS, MlpPlacement.STAGED),
            (RankPlacement.TENSOR, MlpPlacement.STAGED),
            (RankPlacement.TENSOR, MlpPlacement.SEQUENTIAL),
        )
    ]


def planned_collectives(placement: RankPlacement, plan: LayerPlan) -> Counter[str]:
    """Of one pass with logits."""
    wide = [group for group in plan.groups if len(group) > 1]
    planned = Counter(share=1)
    if placement is RankPlacement.TENSOR:
        num_mlp_sums = len(plan.groups) if plan.mlp is MlpPlacement.STAGED else plan.num_layers
        return planned + Counter(sum=len(plan.groups) + num_mlp_sums, gather=1)
    planned["gather"] = len(wide)
    if plan.mlp is MlpPlacement.STAGED:
        planned["sum"] = len(wide)
    elif placement is RankPlacement.LAYERS_SHARDED_MLP:
        planned["sum"] = sum(len(group) for group in wide)
    return planned


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_layer_parallel_ranks_compute_what_one_does(folders: dict[str, Path], num_ranks: int) -> None:
    """Three ranks share groups of two and three layers: some have nothing to do, and tensor shards do not exist."""
    cases = [
        case
        for name in ("llama, biases", "qwen3", "gemma2", "cohere2", "qwen3_moe")
        for case in layer_cases(folders[name])
        if num_ranks == 2 or case[1] is RankPlacement.LAYERS
    ]
    exact = (folders["qwen3"], RankPlacement.LAYERS, sequential_plan(NUM_LAYERS), "native")
    led, *_ = run_ranks(num_ranks, compute_all, [*cases, exact])
    for computed, (folder, placement, plan, executor) in zip(led, [*cases, exact], strict=True):
        assert_same(computed, compute(folder, SINGLE_RANK, placement, plan, executor))
        assert computed.collectives == [planned_collectives(placement, plan)] * 3
    assert led[-1].collectives[0] == {"share": 1}, "the exact pass needs no collective of its own"


@pytest.mark.parametrize(
    ("num_ranks", "placement", "message"),
    [
        (3, RankPlacement.TENSOR, r"tensor_parallel_size is 3: 4 heads.*allowed: 1, 2, 4"),
        (5, RankPlacement.LAYERS_SHARDED_MLP, r"on 5 ranks: an MLP of 96 .*allowed: 1, 2, 3, 4, 6, 8 ranks"),
    ],
)
def test_a_split_that_is_not_even_is_refused_with_those_that_are(
    folders: dict[str, Path], num_ranks: int, placement: RankPlacement, message: str
) -> None:
    folder = folders["llama"]
    with pytest.raises(ConfigurationError, match=message):
        Passes(folder, ranks=SingleRank(0, num_ranks), placement=placement)


def test_norms_over_all_heads_of_a_row_are_refused_on_tensor_ranks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "olmo2")
    with pytest.raises(ConfigurationError, match=r"olmo2 model norms all heads of a row together.* allowed: 1, or"):
        Passes(tmp_path, ranks=SingleRank(0, 2), placement=RankPlacement.TENSOR)
    Passes(tmp_path, ranks=SingleRank(0, 2), placement=RankPlacement.LAYERS)
