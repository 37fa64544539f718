from __future__ import annotations

from gateway.speculation.estimates import BusyClock


def test_only_time_in_which_somebody_was_served_counts() -> None:
    now_s = 100.0
    clock = BusyClock(lambda: now_s)
    assert clock.read(was_busy=True) == 0.0
    now_s = 103.0
    assert clock.read(was_busy=True) == 3.0
    now_s = 200.0
    assert clock.read(was_busy=False) == 3.0
    now_s = 200.5
    assert clock.read(was_busy=True) == 3.5
