"""Prompts that begin alike meet at one replica, as long as it has no more than its share."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from gateway.peers.replica_set import preferred


@dataclass
class Server:
    address: str
    num_sessions: int = 0


def servers(count: int) -> list[Server]:
    return [Server(f"host{index}:1") for index in range(count)]


def prompt(seed: int, length: int = 400) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(50_000) for _ in range(length)]


def test_one_beginning_one_replica_whichever_gateway_asks() -> None:
    for seed in range(50):
        begun = prompt(seed)
        homes = {
            (found.address if (found := preferred(replicas, begun + prompt(other, other))) else None)
            for other in range(5)
            for replicas in (servers(4), servers(4)[::-1])
        }
        assert len(homes) == 1


def test_beginnings_are_spread_and_stay_where_they_are_when_a_replica_goes() -> None:
    before, homes = servers(4), {}
    for seed in range(400):
        found = preferred(before, prompt(seed))
        assert found is not None
        homes[seed] = found.address
    assert min(Counter(homes.values()).values()) > 60
    fewer = before[1:]
    for seed, home in homes.items():
        found = preferred(fewer, prompt(seed))
        assert found is not None
        assert home == before[0].address or found.address == home


def test_a_popular_beginning_overflows_by_longer_beginnings() -> None:
    replicas, shared = servers(4), prompt(0, 100)
    held: Counter[str] = Counter()
    for number in range(80):
        found = preferred(replicas, shared + prompt(number % 8 + 1, 300)) or min(
            replicas, key=lambda one: one.num_sessions
        )
        found.num_sessions += 1
        held[found.address] += 1
    assert max(held.values()) <= 26
    assert len(held) == 4


def test_short_prompts_have_no_home() -> None:
    assert preferred(servers(3), prompt(1, 63)) is None
    assert preferred(servers(3), ()) is None
