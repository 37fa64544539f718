from __future__ import annotations

import pytest

from bench.decode.samples import PLAIN, SEQUENTIAL, Sample, all_modes, select_modes
from bench.harness.streams import Counts
from easyspec.errors import ConfigurationError
from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement
from tests.bench.decode.samples import drafted_sample, make_round


def test_modes_are_plain_sequential_and_every_parallel_plan() -> None:
    modes = all_modes()
    assert modes[:2] == (PLAIN, SEQUENTIAL)
    assert len({mode.name for mode in modes}) == len(modes) == 2 + 4 * 2 * 2
    plans = {mode.layer_plan for mode in modes[2:]}
    assert plans == {
        LayerPlanRequest(size, mlp, calibration)
        for size in (2, 3, 4, 6)
        for mlp in MlpPlacement
        for calibration in (True, False)
    }


def test_plain_is_always_measured_and_measured_once() -> None:
    assert [mode.name for mode in select_modes(["n4-staged"])] == ["plain", "n4-staged"]
    assert [mode.name for mode in select_modes(["plain", "seq*"])] == ["plain", "sequential"]


def test_a_pattern_without_a_mode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'n5-\\*' matches none of plain, sequential"):
        select_modes(["sequential", "n5-*"])


def test_speed_excludes_the_first_round() -> None:
    sample = drafted_sample(SEQUENTIAL, 0, round_s=0.5, token_ids=tuple(range(7)))
    assert sample.tokens_per_s == 6 / 1.0


def test_a_completion_of_one_round_has_no_speed() -> None:
    assert Sample(PLAIN, 0.0, 0, (1,), (make_round(1.0, 1),), Counts(), 1.0).tokens_per_s is None
