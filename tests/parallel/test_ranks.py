"""Collectives over real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from easyspec.errors import EngineLostError
from easyspec.parallel.ranks import SINGLE_RANK, GroupRanks, join_group
from tests.parallel.rank_runner import run_ranks

CPU = torch.device("cpu")


def joined() -> GroupRanks:
    ranks = join_group(CPU, timeout_s=60)
    assert isinstance(ranks, GroupRanks)
    return ranks


def sums_and_gathers() -> Any:
    ranks = joined()
    part = torch.arange(6.0).view(2, 3) * 10**ranks.rank
    gathered = ranks.gather(part)
    # In rank order, so that the bits do not depend on a row's place: large and small values cancel differently.
    awkward = torch.tensor([[1e8, 1.0, -1e8, 3.0][ranks.rank % 4]]).expand(97)
    return ranks.sum(part), gathered, ranks.sum(awkward), dict(ranks.num_collectives)


def test_sums_are_formed_in_rank_order_and_counted() -> None:
    for total, gathered, awkward, counts in run_ranks(4, sums_and_gathers):
        base = torch.arange(6.0).view(2, 3)
        assert torch.equal(total, base * 1111)
        assert torch.equal(gathered, torch.stack([base * 10**rank for rank in range(4)]))
        in_order = ((torch.tensor(1e8) + 1.0) - 1e8) + 3.0
        assert torch.equal(awkward, in_order.expand(97))
        assert counts == {"sum": 2, "gather": 1}


def shares(sizes: list[int]) -> Any:
    ranks = joined()
    payloads = [bytes(i % 251 for i in range(size)) for size in sizes]
    received = [ranks.share(payload if ranks.rank == 0 else None) for payload in payloads]
    return received == payloads, ranks.num_collectives["share"]


def test_small_messages_take_one_broadcast_and_large_ones_two() -> None:
    assert run_ranks(2, shares, [0, 1, 1000, 32 * 1024]) == [(True, 4)] * 2
    assert run_ranks(2, shares, [32 * 1024 + 1, 300_000]) == [(True, 4)] * 2


def loses_a_rank() -> Any:
    ranks = joined()
    if ranks.rank == 1:
        return "left"
    with pytest.raises(EngineLostError):
        keep_asking(ranks)
    return "noticed"


def keep_asking(ranks: GroupRanks) -> None:
    for _ in range(100):
        ranks.share(b"anybody there?")


def test_a_lost_rank_is_an_error_and_no_hang() -> None:
    assert run_ranks(2, loses_a_rank) == ["noticed", "left"]


def test_a_single_rank_needs_no_group() -> None:
    part = torch.ones(3)
    assert SINGLE_RANK.sum(part) is part
    assert SINGLE_RANK.gather(part).shape == (1, 3)
    assert SINGLE_RANK.share(b"x") == b"x"
    assert join_group(CPU) is SINGLE_RANK
