"""The counter of looks must see them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.fakes.device_looks import counted_looks

_LOOKS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "branch": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "index by truth": lambda x: x[x > 0],
    "assignment by truth": lambda x: x.clone().__setitem__(x > 0, torch.ones(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "unique": lambda x: x.unique(),
    "repetition": lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])),
}


@pytest.mark.parametrize("look", _LOOKS.values(), ids=_LOOKS)
@pytest.mark.parametrize("is_inference", [False, True])
def test_a_look_is_counted_once(look: Callable[[torch.Tensor], object], is_inference: bool) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with torch.inference_mode(is_inference), counted_looks() as looks:
        look(x)
    assert looks.total() == 1


@torch.inference_mode()
def test_what_waits_for_nothing_is_not() -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with counted_looks() as looks:
        index = torch.tensor([0, 2])
        chosen = torch.where(x > 0, x, -x)[index]
        x[index] = chosen.masked_fill_(chosen > 2, 0.0)
        x.topk(2).values.cumsum(0).repeat_interleave(2)
        _ = len(x), x.shape, x.dtype
    assert looks == {}
