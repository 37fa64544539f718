"""Counts where a GPU's host would have to wait for it: wherever Python looks at a value of a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# In inference mode composite operations arrive whole: `item` rather than what it consists of.
_OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::masked_select",
    "aten::equal",
    "aten::allclose",
    "aten::_unique2",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
    "aten::repeat_interleave.self_Tensor",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# On a CPU these read memory without an operation.
_METHODS = {"tolist", "numpy", "cpu"}
_MODULES = (
    "easyspec.speculation.sampling",
    "easyspec.speculation.filters",
    "easyspec.speculation.logprobs",
    "easyspec.ops.reference",
)


def is_look(func: Any, args: Any) -> bool:
    """Whether an operation's result, or its size, depends on values in a way that the host has to know."""
    name = func._schema.name
    if name == "aten::where":
        return len(args) == 1
    if name in _INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in _OPERATIONS or f"{name}.{func._overloadname}" in _OPERATIONS


class _Operations(TorchDispatchMode):
    def __init__(self, looks: Counter[str]) -> None:
        super().__init__()
        self._looks = looks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_look(func, args):
            self._looks[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, looks: Counter[str]) -> None:
        super().__init__()
        self._looks = looks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS and args and isinstance(args[0], torch.Tensor):
            self._looks[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_looks() -> Iterator[Counter[str]]:
    """Looks of this thread, by name."""
    looks: Counter[str] = Counter()
    with _Methods(looks), _Operations(looks):
        yield looks


def pretend_remote(patch: pytest.MonkeyPatch) -> None:
    """Take the branches that are for tensors on a GPU."""
    for module in _MODULES:
        patch.setattr(f"{module}.is_remote", lambda tensor: True)
