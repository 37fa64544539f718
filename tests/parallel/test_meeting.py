"""Ranks that meet again in a store where earlier ones have left what they said."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore
from torch.distributed.distributed_c10d import Store

from easyspec.errors import ConfigurationError
from easyspec.parallel.meeting import agree

SIZE = 3


def attempt(store: Store, ranks: range = range(SIZE), timeout_s: float = 10.0) -> list[Store]:
    """The stores that these ranks agree on, all at once."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        return [*threads.map(lambda rank: agree(store, rank, SIZE, timeout_s), ranks)]


def test_every_attempt_has_a_store_of_its_own_that_all_of_its_ranks_share() -> None:
    store = HashStore()
    for number in range(5):
        agreed = attempt(store)
        assert not any(each.check(["address"]) for each in agreed), "something of an earlier attempt"
        agreed[0].set("address", f"of attempt {number}")
        assert [each.get("address") for each in agreed] == [f"of attempt {number}".encode()] * SIZE


@pytest.mark.parametrize("came", [range(1), range(1, SIZE), range(2)])
def test_an_attempt_that_some_missed_harms_no_later_one(came: range) -> None:
    store = HashStore()
    attempt(store)[0].set("address", "of the first attempt")
    with pytest.raises(ConfigurationError, match="the ranks cannot meet"):
        attempt(store, came, timeout_s=0.2)
    agreed = attempt(store)
    assert not any(each.check(["address"]) for each in agreed)
    agreed[2].set("address", "new")
    assert agreed[0].get("address") == b"new"
