"""What a soak counts as growth."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.chaos.limits import Footprint
from bench.chaos.soak import SoakReport


def report(at_rest: Callable[[int], Footprint]) -> SoakReport:
    made = SoakReport(seed=1, warm_up_rests=3)
    made.footprints["gateway"] = [at_rest(number) for number in range(12)]
    return made


@pytest.mark.parametrize(
    ("at_rest", "num_failures"),
    [
        (lambda number: Footprint(100.0, 20, 9), 0),
        (lambda number: Footprint(100.0 + number % 3, 20, 9), 0),
        (lambda number: Footprint(50.0 if number < 3 else 100.0, 3 if number < 3 else 20, 9), 0),  # while it warms up
        (lambda number: Footprint(100.0 + number, 20, 9), 1),
        (lambda number: Footprint(100.0, 20 + number, 9), 1),
        (lambda number: Footprint(100.0, 20, 9 + (number > 9)), 1),
        (lambda number: Footprint(100.0, 20, 9 + (number == 11)), 0),
        (lambda number: Footprint(100.0, 20 + (number in (3, 9, 10)), 9), 0),  # a connection that comes and goes
    ],
)
def test_what_grows_after_the_warm_up_makes_a_soak_fail(at_rest: Callable[[int], Footprint], num_failures: int) -> None:
    assert len(report(at_rest).failures) == num_failures


def test_a_soak_that_was_too_short_to_tell_fails() -> None:
    made = SoakReport(seed=1, warm_up_rests=20)
    made.footprints["gateway"] = [Footprint(100.0, 20, 9)] * 12
    assert len(made.failures) == 1
