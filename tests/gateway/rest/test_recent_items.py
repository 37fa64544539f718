"""What clients may refer to, for how long and how much of it."""

from __future__ import annotations

from gateway.rest.recent_items import RecentItems


def test_items_are_found_by_their_client_for_an_hour() -> None:
    now_s = 0.0
    items = RecentItems(clock=lambda: now_s)
    items.remember("a", [{"id": "x", "text": "1"}, {"id": "y", "text": "2"}])
    assert items.find("a", "y") == {"id": "y", "text": "2"}
    assert items.find("b", "y") is None
    assert items.find("a", "z") is None
    now_s = 3599.0
    assert items.find("a", "x") is not None
    now_s = 3600.0
    assert items.find("a", "x") is None


def test_the_oldest_go_when_there_is_no_room() -> None:
    items = RecentItems(max_bytes=5000)
    for number in range(20):
        items.remember("a", [{"id": str(number), "text": "x" * 450}])
    kept = [number for number in range(20) if items.find("a", str(number)) is not None]
    assert kept == list(range(20 - len(kept), 20))
    assert 2 <= len(kept) <= 5
    items.remember("a", [{"id": "large", "text": "x" * 10_000}])
    assert items.find("a", "large") is None


def test_what_is_found_is_a_copy() -> None:
    items, item = RecentItems(), {"id": "x", "content": ["a"]}
    items.remember("a", [item])
    item["content"] = []
    assert items.find("a", "x") == {"id": "x", "content": ["a"]}
