from __future__ import annotations

from easyspec.usual_time import UsualTime


def test_the_bound_follows_what_is_usual() -> None:
    usual = UsualTime()
    assert usual.bound_s == 30.0
    for _ in range(200):
        usual.learn(0.1)
    assert usual.bound_s == 30.0
    for _ in range(200):
        usual.learn(5.0)
    assert 95.0 < usual.bound_s <= 100.0
    usual.learn(30.0)  # one that hung does not count much
    assert usual.bound_s < 130.0
