"""What takes part in a round: the better rate of tokens a second, for each request, and not for ever."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from drafter_service.worth import ByTarget, Choice, ModelAlone, Option, RoundChoices, RowTime, TokenTime, Trial
from easyspec.engine.average import MAX_OUTLIER, Average, clock_average

WITHOUT_S, PRICE_S = 0.026, 0.014


class Request:
    """Rounds of one request: `plain` tokens without the option, and what it brings with it."""

    def __init__(self, option: Option, others: TokenTime | None = None) -> None:
        self._token_time = TokenTime(others)
        self._choice = Choice(option, self._token_time)

    def round(self, plain: int, with_option: int) -> bool:
        """Whether the option took part; the request learns what the round came to."""
        has_option = self._choice.is_worth_it()
        if has_option:
            self._choice.observe(with_option - plain, PRICE_S)
        duration_s = WITHOUT_S + PRICE_S if has_option else WITHOUT_S
        self._token_time.observe(duration_s, with_option if has_option else plain)
        return has_option


@pytest.mark.parametrize(
    ("with_option", "plain", "is_taken"), [(4, 2, True), (4, 3, False), (9, 7, False), (9, 3, True)]
)
def test_the_better_rate_wins(with_option: int, plain: int, is_taken: bool) -> None:
    """A round with the option takes 40 ms, one without 26."""
    request = Request(Option())
    rounds = [request.round(plain, with_option) for _ in range(400)]
    share = sum(rounds) / len(rounds)
    assert share > 0.95 if is_taken else share < 0.1


def test_what_it_learned_does_not_stay_for_ever() -> None:
    request = Request(Option())

    def taken(with_option: int, num_rounds: int) -> int:
        return sum(request.round(3, with_option) for _ in range(num_rounds))

    assert taken(with_option=3, num_rounds=200) < 20
    taken(with_option=8, num_rounds=6000)
    assert taken(with_option=8, num_rounds=100) > 90


def test_a_request_that_the_option_does_not_help_leaves_it_out_soon() -> None:
    """Of others it is known that it brings much at such rounds."""
    option, time = Option(), TokenTime()
    others = Request(option, time)
    for _ in range(200):
        assert others.round(4, 8)
    copying = Request(option, time)
    rounds = [copying.round(9, 9) for _ in range(30)]
    assert sum(rounds) <= 15
    assert sum(rounds[15:]) <= 1, "tried again when that had become cheap"
    assert sum(others.round(4, 8) for _ in range(20)) == 20


def test_a_request_out_of_the_ordinary_tries_it_again_though_others_never_leave_it_out() -> None:
    option, time = Option(), TokenTime()
    others, copying = Request(option, time), Request(option, time)
    for _ in range(100):
        others.round(4, 8)
    taken = []
    for _ in range(1500):
        others.round(4, 8)
        taken.append(copying.round(9, 9))
    assert 1 <= sum(taken[100:]) <= 60


def test_a_kind_of_round_is_judged_by_itself_and_a_rare_one_like_the_others() -> None:
    option, time = Option(num_kinds=3), TokenTime()
    for _ in range(40):
        time.observe(WITHOUT_S, 4)
        Choice(option, time).observe(4, PRICE_S, kind=0)
        Choice(option, time).observe(0, PRICE_S, kind=1)
    request = Choice(option, time)
    assert request.is_worth_it(0)
    assert not request.is_worth_it(1)
    assert request.is_worth_it(2), "nothing is known of it"
    for _ in range(2):
        request.observe(0, PRICE_S, kind=2)
    assert 0 < option.gain.of(2) < option.gain.of(0)


def test_a_token_is_worth_to_a_new_request_what_it_is_to_others() -> None:
    others = TokenTime()
    for _ in range(50):
        others.observe(0.1, 10)
    request = TokenTime(others)
    request.observe(0.1, 1)
    assert request.seconds is not None
    assert 0.01 < request.seconds < 0.02, "one poor round does not make its tokens ten times as dear"


def test_the_model_alone_is_worth_its_tokens_less_its_time() -> None:
    alone, time = ModelAlone(), TokenTime()
    time.observe(0.02, 2)
    alone.observe(0, 5, 0.03)
    assert alone.worth(0, time) == pytest.approx(5 - 3)


def test_what_many_requests_have_shown_spares_a_new_one_the_trying() -> None:
    option, time = Option(), TokenTime()
    for _ in range(20):
        request = Request(option, time)
        for _ in range(40):
            request.round(4, 4)
    request = Request(option, time)
    assert sum(request.round(4, 4) for _ in range(16)) <= 1, "what all requests try in so many rounds"


def test_requests_too_short_to_try_it_again_do_so_together() -> None:
    """The first rounds of all say nothing for it: its guesses have not learned yet what they are worth."""
    option, time = Option(), TokenTime()
    first = Request(option, time)
    assert sum(first.round(4, 4) for _ in range(12)) < 12
    taken = 0
    for _ in range(300):
        request = Request(option, time)
        taken = sum(request.round(4, 12) for _ in range(5))
    assert taken == 5


def test_without_any_measurement_everything_takes_part() -> None:
    assert Choice(Option(), TokenTime()).is_worth_it()
    assert TokenTime().seconds is None
    shared = TokenTime()
    shared.observe(0.2, 4)
    assert TokenTime(shared).seconds == 0.05, "a new request begins with what others have learned"


def test_a_silent_client_is_not_a_slow_round() -> None:
    time = TokenTime()
    for _ in range(20):
        time.observe(0.04, 2)
    time.observe(3600.0, 2)
    assert time.seconds is not None
    assert time.seconds < 2 * 0.02


@pytest.mark.parametrize(("make", "most"), [(Average, 100.0), (clock_average, MAX_OUTLIER)])
def test_an_average_follows_and_outliers_count_as_told(make: Callable[[], Average], most: float) -> None:
    average = make()
    for number in (1.0, 1.0, 1.0, 100.0):
        average.add(number)
    assert average.value == pytest.approx(1.0 + (most - 1.0) / 4)
    for _ in range(200):
        average.add(2.0)
    assert average.value == pytest.approx(2.0, rel=1e-3)


def test_the_target_unused_for_longest_is_forgotten() -> None:
    known: ByTarget[list[int]] = ByTarget(lambda: [0], max_targets=2)
    first, second = known.of("first"), known.of("second")
    assert known.of("first") is first
    known.of("third")
    assert known.of("first") is first
    assert known.of("second") is not second


@pytest.mark.parametrize("with_s", [0.6, 1.5])
def test_a_trial_settles_for_what_is_faster_and_looks_again(with_s: float) -> None:
    trial, rounds = Trial(), []
    for _ in range(2000):
        rounds.append(trial.is_on)
        trial.observe(was_on=trial.is_on, round_s=with_s if trial.is_on else 1.0, num_tokens=1)
    share = sum(rounds[200:]) / 1800
    assert share > 0.9 if with_s < 1.0 else share < 0.1
    assert 0 < share < 1


def away_s(num_nodes: int, row_s: float) -> float:
    """An answer that takes 8 ms and so much for each node."""
    return 0.008 + row_s * num_nodes


def row_time_of(sizes: Sequence[int], row_s: float, noise_s: float = 0.0, num_rounds: int = 400) -> RowTime:
    chance, row_time = random.Random(5), RowTime()
    for _ in range(num_rounds):
        num_nodes = chance.choice(sizes)
        row_time.observe(num_nodes, away_s(num_nodes, row_s) + chance.expovariate(1.0) * noise_s)
    return row_time


@pytest.mark.parametrize("row_s", [0.0, 0.0003, 0.001])
def test_the_time_of_a_row_is_found_among_noise(row_s: float) -> None:
    assert row_time_of(range(17), row_s, noise_s=0.001).seconds == pytest.approx(row_s, abs=0.0001)


def test_pauses_of_the_machine_are_no_rows() -> None:
    row_time = row_time_of(range(17), 0.0003)
    row_time.observe(16, 5.0)
    assert row_time.seconds == pytest.approx(0.0003, abs=0.0002)


def test_trees_of_one_size_say_nothing_of_rows() -> None:
    assert row_time_of([16], 0.001, noise_s=0.002).seconds < 0.00005


def test_rows_that_become_cheaper_are_sent_again() -> None:
    row_time = row_time_of(range(17), 0.001)
    for _ in range(600):
        for num_nodes in (2, 4, 6):
            row_time.observe(num_nodes, away_s(num_nodes, 0.0001))
    assert row_time.seconds < 0.0002


def test_a_node_is_worth_its_row_from_the_tokens_that_its_time_would_bring() -> None:
    """Tokens take 5 ms each, a row 0.5: what is accepted once in ten times pays."""
    choices = RoundChoices()
    assert choices.least_node_value == 0.0
    for num_nodes in [*range(17)] * 20:
        choices.token_time.observe(0.010, 2)
        choices.row_time.observe(num_nodes, away_s(num_nodes, 0.0005))
    assert choices.least_node_value == pytest.approx(0.1, rel=0.1)


def test_what_one_request_knows_of_rows_others_know() -> None:
    shared = RoundChoices()
    for num_nodes in [*range(17)] * 20:
        RoundChoices(shared).row_time.observe(num_nodes, away_s(num_nodes, 0.0005))
    assert RoundChoices(shared).row_time.seconds == pytest.approx(0.0005, rel=0.1)
