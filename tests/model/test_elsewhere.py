"""The reference executor on a device that is not the CPU: torch's meta device stands in for a GPU."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.reference import ReferenceExecutor
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import MlpPlacement
from tests.fakes.checkpoints import write_checkpoint

ELSEWHERE = torch.device("meta")
# How the rows of a pass come from the host.
_FROM_THE_HOST = ("to", "_to_copy", "lift_fresh", "detach")
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

    def blocks(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> None:
        return None


class _OneDevice(TorchDispatchMode):
    """Every operation reads and makes tensors of one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _FROM_THE_HOST:
            return result
        for each in pytree.tree_leaves((args, kwargs, result)):
            assert not isinstance(each, torch.Tensor) or each.device == ELSEWHERE, f"{func} on {each.device}"
        return result


@pytest.mark.parametrize("plan", PLANS, ids=["sequential", "paper", "staged"])
@pytest.mark.parametrize("options", [{}, {"model_type": "qwen3", "head_dim": 32}], ids=["llama", "qwen3"])
@torch.inference_mode()
def test_a_pass_stays_on_its_device(tmp_path: Path, options: dict[str, Any], plan: LayerPlan) -> None:
    config = load_config(write_checkpoint(tmp_path, **options))
    decoder = Decoder(tmp_path, config, ReferenceExecutor(ELSEWHERE), open_tensors=lambda _: ShapesAlone())
    pool = decoder.new_pool(600)
    segment = Segment([1, 2], range(2), [1, 2], [1, 2], np.arange(1, 3))
    layout = lay_out([segment, segment])
    with _OneDevice():
        result = decoder.forward(layout, pool, plan, [0, 3], keeps_hidden=True)
        hidden = decoder.forward_between(layout, pool, plan, range(1))
        logits = decoder.logits(hidden)
    assert result.hidden is not None
    assert {each.device for each in (result.logits, result.hidden, hidden, logits)} == {ELSEWHERE}
    assert result.logits.shape == (2, config.vocab_size)
    assert logits.shape == (4, config.vocab_size)
