"""A recorder with the semantics of CUDA graphs, on a CPU: it repeats operations on the same memory, not Python."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from easyspec.model.captures import Body
from tests.fakes.device_looks import is_look


class _Trace(TorchDispatchMode):
    """Notes every operation with the very tensors it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_look(func, args):
            raise AssertionError(f"{func} cannot be captured")
        kwargs = kwargs or {}
        read = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        is_writing = any(returned.alias_info and returned.alias_info.is_write for returned in func._schema.returns)
        is_view = any(each.untyped_storage().data_ptr() in read for each in _tensors(result))
        if is_writing or not is_view:  # a view shows what its base holds by then
            self.operations.append((func, args, kwargs, None if is_writing else result))
        return result


class TraceRecorder:
    """Replays run the recorded operations again, each into the memory that it wrote when it was recorded."""

    held_bytes = 0

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replays = 0

    def record(self, body: Body) -> Body:
        body()  # warm-up: masks and the like are made anew in every call, and so in the recorded one
        self.num_recorded += 1
        with _Trace() as trace:
            body()

        def replay() -> None:
            self.num_replays += 1
            for func, args, kwargs, result in trace.operations:
                _repeat(func, args, kwargs, result)

        return replay


def _repeat(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Call again; what comes out anew goes where `result` is, if the operation did not write in place."""
    again = func(*args, **kwargs)
    if result is not None:
        for before, now in zip(_tensors(result), _tensors(again), strict=True):
            before.copy_(now)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in pytree.tree_leaves(values) if isinstance(each, torch.Tensor)]
