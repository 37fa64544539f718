from __future__ import annotations

import math
from dataclasses import replace

import pytest

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import MAX_SEED, SamplingParameters, StopConditions, TreeBudget

V = 100
GOOD = SamplingParameters(seed=1)

ALLOWED = [
    GOOD,
    SamplingParameters(seed=0, temperature=0.0, top_k=1, top_p=1e-9, min_p=0.0, repetition_penalty=1e-9),
    SamplingParameters(seed=MAX_SEED, temperature=100.0, top_k=10**6, top_p=1.0, min_p=1.0, repetition_penalty=100.0),
    SamplingParameters(seed=1, presence_penalty=-2.0, frequency_penalty=2.0, logit_bias={0: -100.0, V - 1: 100.0}),
]


@pytest.mark.parametrize("sampling", ALLOWED)
def test_limits_are_allowed(sampling: SamplingParameters) -> None:
    sampling.check(V)


REFUSED = [
    ("seed", -1),
    ("seed", MAX_SEED + 1),
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("top_k", 0),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 100.5),
    ("presence_penalty", -2.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", 2.1),
    *((name, bad) for name in ("temperature", "top_p", "min_p") for bad in (math.nan, math.inf, -math.inf)),
    *((f"{name}_penalty", bad) for name in ("repetition", "presence", "frequency") for bad in (math.nan, math.inf)),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_values_out_of_range_are_refused_by_field_and_value(name: str, value: float) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        replace(GOOD, **{name: value}).check(V)
    assert refused.value.field == f"sampling.{name}"
    assert refused.value.value is value
    assert str(refused.value).startswith(f"sampling.{name} is {value!r}; allowed: ")


@pytest.mark.parametrize(
    ("bias", "field"),
    [
        ({V: 1.0}, "sampling.logit_bias token id"),
        ({-1: 1.0}, "sampling.logit_bias token id"),
        ({5: 100.5}, "sampling.logit_bias[5]"),
        ({5: -math.inf}, "sampling.logit_bias[5]"),
        ({5: math.nan}, "sampling.logit_bias[5]"),
    ],
)
def test_bad_biases_are_refused(bias: dict[int, float], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        replace(GOOD, logit_bias=bias).check(V)
    assert refused.value.field == field


def test_what_the_choice_depends_on() -> None:
    assert not GOOD.is_greedy
    assert replace(GOOD, temperature=0.0).is_greedy
    assert not replace(GOOD, temperature=5e-324).is_greedy
    assert not GOOD.has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert replace(GOOD, **{name: 1.5}).has_penalties


def test_stop_conditions() -> None:
    StopConditions().check(V)
    StopConditions(max_tokens=1, stop_token_ids=frozenset({0, V - 1})).check(V)
    with pytest.raises(InvalidRequestError, match=r"stop\.max_tokens is 0; allowed: at least 1"):
        StopConditions(max_tokens=0).check(V)
    with pytest.raises(InvalidRequestError, match=r"stop\.stop_token_ids is 100; allowed: 0 to 99"):
        StopConditions(stop_token_ids=frozenset({5, V})).check(V)


@pytest.mark.parametrize("name", ["num_levels", "width", "num_nodes"])
def test_tree_budgets(name: str) -> None:
    budget = TreeBudget(num_levels=1, width=1, num_nodes=1)
    budget.check(64)
    replace(budget, **{name: 64}).check(64)
    for value in (0, 65):
        with pytest.raises(InvalidRequestError) as refused:
            replace(budget, **{name: value}).check(64)
        assert (refused.value.field, refused.value.value) == (f"budget.{name}", value)
