"""Captured passes on a device that is not the CPU: torch's meta device stands in for a GPU.

Like a tensor that is being captured, one of its own has no values to look at.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from easyspec.model.captures import Body, TwinRecorder
from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KVPool
from easyspec.model.pass_graphs import CapturedLayout, CaptureLimits, CaptureRequest
from easyspec.model.pass_shapes import ShapeLimits
from easyspec.model.row_layout import Segment
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import MlpPlacement
from tests.fakes.checkpoints import write_checkpoint

ELSEWHERE = torch.device("meta")
PLANS = (
    LayerPlan((range(1), range(1, 2), range(2, 3))),
    LayerPlan((range(1), range(1, 3)), MlpPlacement.SEQUENTIAL),
    LayerPlan((range(1), range(1, 3)), MlpPlacement.STAGED),
)


class ShapesAlone:
    """A TensorSource without values."""

    def __enter__(self) -> ShapesAlone:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        return torch.empty(shape, device=ELSEWHERE)


class _OneDevice(TorchDispatchMode):
    """Every operation reads and makes tensors of one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in pytree.tree_leaves((args, kwargs, result)):
            assert not isinstance(each, torch.Tensor) or each.device == ELSEWHERE, f"{func} on {each.device}"
        return result


class CheckedRecorder(TwinRecorder):
    """A twin that watches where bodies compute."""

    def record(self, body: Body) -> Body:
        with _OneDevice():
            body()
        return body


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("options", [{}, {"model_type": "qwen3", "head_dim": 32}], ids=["llama", "qwen3"])
@torch.inference_mode()
def test_a_captured_pass_stays_on_its_device(tmp_path: Path, options: dict[str, Any], is_exact: bool) -> None:
    config = load_config(write_checkpoint(tmp_path, **options))
    decoder = Decoder(tmp_path, config, ELSEWHERE, is_exact=is_exact, open_tensors=lambda _: ShapesAlone())
    pool = KVPool(config, 600, ELSEWHERE)
    requests = [CaptureRequest(plan, 8) for plan in PLANS[: 1 if is_exact else 3]]
    report = decoder.capture(pool, requests, CheckedRecorder(), CaptureLimits(ShapeLimits(16, 16)))
    assert report.failure is None
    assert report.num_captured > 5 * len(requests)
    segment = Segment([1, 2], range(2), [1, 2], [1, 2], torch.arange(128).numpy())
    for request in requests:
        layout = decoder.arrange([segment, segment], request.plan)
        assert isinstance(layout, CapturedLayout)
        hidden = decoder.forward(layout, pool, request.plan)
        assert hidden.device == ELSEWHERE
        assert hidden.shape == (layout.shape.num_rows, config.hidden_size)
