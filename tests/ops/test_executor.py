from __future__ import annotations

import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.ops import native_library
from easyspec.ops.executor import choose_executor
from tests.ops.small_model import CPU, PATHS


@pytest.mark.skipif(not PATHS, reason="the library was not built")
def test_the_native_executor_runs_on_a_cpu() -> None:
    for name in ("auto", "native"):
        name = choose_executor(name, CPU, 1).name
        assert name.startswith("native-")
        assert choose_executor("native-8bit", CPU, 1).name == f"{name}-8bit"
        assert choose_executor("auto", CPU, 1, is_auto_8bit=True).name == f"{name}-8bit"
    assert not choose_executor("native", CPU, 1, is_auto_8bit=True).name.endswith("-8bit")
    assert choose_executor("reference", CPU, 1).name == "reference"


def test_other_devices_have_the_reference() -> None:
    device = torch.device("meta")
    for name in ("auto", "reference"):
        executor = choose_executor(name, device, 1)
        assert (executor.name, executor.device) == ("reference", device)
    with pytest.raises(ConfigurationError, match="executor is 'native', which runs on a CPU; allowed for a GPU"):
        choose_executor("native", device, 1)


def test_where_the_library_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "library_problem", lambda: "its library was not built")
    assert choose_executor("auto", CPU, 1).name == "reference"
    with pytest.raises(ConfigurationError, match="executor is 'native': its library was not built"):
        choose_executor("native", CPU, 1)


def test_an_unknown_executor_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="executor is 'abacus'; allowed: auto, native, native-8bit, reference"):
        choose_executor("abacus", CPU, 1)
