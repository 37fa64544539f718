"""Who is worth waiting for before a step begins, by a clock of our own."""

from __future__ import annotations

from dataclasses import dataclass

from verifier_service.patience import Patience

MS = 1_000_000
STEP_MS = 10


@dataclass
class Session:
    """Was answered at `last_verdict_ns`, and usually asks again `turnaround_ns` later."""

    last_verdict_ns: int | None = 0
    turnaround_ns: float | None = None


def patience_after_a_step() -> Patience:
    patience = Patience()
    patience.stepped(STEP_MS * MS)
    return patience


def returning(after_ms: float, answered_ms: float = 0.0) -> Session:
    return Session(int(answered_ms * MS), after_ms * MS)


def test_a_session_that_is_about_to_come_back_is_waited_for() -> None:
    assert 1.5 * MS <= patience_after_a_step().wait_ns([returning(after_ms=1.5)], now=0) <= 2 * MS


def test_the_wait_is_for_the_last_of_those_who_come_in_time_and_for_nobody_later() -> None:
    wait_ns = patience_after_a_step().wait_ns([returning(1), returning(2), returning(20)], now=0)
    assert 2 * MS <= wait_ns <= 3 * MS


def test_who_drafts_is_not_waited_for() -> None:
    assert patience_after_a_step().wait_ns([returning(after_ms=15)], now=0) == 0


def test_who_is_overdue_is_not_waited_for() -> None:
    assert patience_after_a_step().wait_ns([returning(after_ms=1)], now=3 * MS) == 0


def test_a_stranger_is_not_waited_for() -> None:
    strangers = [Session(last_verdict_ns=None), Session(turnaround_ns=None)]
    assert patience_after_a_step().wait_ns(strangers, now=0) == 0


def test_one_wait_is_bounded_by_the_step_before_however_many_come() -> None:
    patience, now = patience_after_a_step(), 0
    for _ in range(100):
        wait_ns = patience.wait_ns([returning(after_ms=1, answered_ms=now / MS)], now)
        if wait_ns == 0:
            break
        now += wait_ns
    assert now <= 0.35 * STEP_MS * MS


def test_nothing_is_waited_for_before_there_was_a_step() -> None:
    assert Patience().wait_ns([returning(after_ms=1)], now=0) == 0


def test_the_turnaround_follows_what_is_seen() -> None:
    patience, session = Patience(), Session(last_verdict_ns=0)
    patience.came_back(session, 2 * MS)
    assert session.turnaround_ns == 2 * MS
    for _ in range(10):
        patience.came_back(session, 8 * MS)
    assert session.turnaround_ns is not None
    assert abs(session.turnaround_ns - 8 * MS) < 0.1 * MS


def test_a_session_without_a_verdict_has_no_turnaround() -> None:
    session = Session(last_verdict_ns=None)
    Patience().came_back(session, 5 * MS)
    assert session.turnaround_ns is None
