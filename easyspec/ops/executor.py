"""Who runs programs: the interface of executors, and the choice of one.

Dimensions: `T` rows of the pass, `S` selected rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from easyspec.errors import ConfigurationError
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.packed import PackedWeight
from easyspec.ops.program import Buffer, ProgramWriter
from easyspec.ops.rows import PassRows
from easyspec.ops.weights import Weight
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.ranking import RankedTokens
from easyspec.speculation.sampling import ChoiceRow

EXECUTORS = ("auto", "native", "native-8bit", "reference")


class Program(Protocol):
    """A compiled program."""

    def run(
        self,
        rows: PassRows,
        pool: KVPool,
        inputs: Mapping[Buffer, torch.Tensor] | None = None,
        outputs: Sequence[Buffer] = (),
    ) -> list[torch.Tensor]:
        """Run the pass: `inputs` are copied in first; views of `outputs` come back, float32 [T or S, width].

        A view is overwritten by the next program that runs, of any decoder of the same executor.
        """


class Executor(Protocol):
    """Packs weights and runs programs. Not thread-safe: the device thread owns it."""

    @property
    def name(self) -> str:
        """ "reference", or "native" with its code path: models run by executors of one name give the same bits."""

    @property
    def device(self) -> torch.device: ...

    @property
    def num_threads(self) -> int:
        """Threads of its own that compute a pass."""

    def use_threads(self, num_threads: int) -> None:
        """Compute passes on so many of its threads, 1 to all, from now on: no bit depends on it."""

    def pack(self, weight: Weight) -> PackedWeight:
        """The weight in this executor's layout; the caller may forget its own."""

    @property
    def chooses_lazily(self) -> bool:
        """Whether choosing at one row at a time, along a walk, costs less than choosing at all rows at once."""

    def choose_tokens(
        self, base_logits: torch.Tensor, rows: Sequence[ChoiceRow], places: Sequence[int] | None = None
    ) -> list[int]:
        """The token chosen at each of `rows`, whose logits are those of `base_logits` float32 [R, V] at `places`, by
        default all in order. -1 where some are NaN or infinite; an accelerator does not look for these."""

    def rank_tokens(
        self,
        logits: torch.Tensor,
        positions: Sequence[int],
        samplings: Sequence[SamplingParameters],
        num_best: int,
        named_ids: torch.Tensor | None = None,
    ) -> list[RankedTokens]:
        """Each row's best next tokens under its noise: see `easyspec.speculation.ranking.rank_tokens`."""

    def compile(self, program: ProgramWriter, ranks: Ranks = SINGLE_RANK) -> Program:
        """A program ready to run."""


def choose_executor(name: str, device: torch.device, num_threads: int, *, is_auto_8bit: bool = False) -> Executor:
    """The executor of a setting; raises ConfigurationError where it cannot run.

    `auto` is native on a CPU for which the library was built, else reference. `native-8bit` is native with inputs of
    integer weights rounded to 8 bits; `is_auto_8bit`: that is what `auto` means.
    """
    from easyspec.ops.native import NativeExecutor
    from easyspec.ops.native_library import library_problem
    from easyspec.ops.reference import ReferenceExecutor

    if name not in EXECUTORS:
        raise ConfigurationError(f"executor is {name!r}; allowed: {', '.join(EXECUTORS)}")
    if name == "reference" or (name == "auto" and (device.type != "cpu" or library_problem() is not None)):
        return ReferenceExecutor(device)
    if device.type != "cpu":
        raise ConfigurationError(f"executor is {name!r}, which runs on a CPU; allowed for a GPU: auto, reference")
    problem = library_problem()
    if problem is not None:
        raise ConfigurationError(f"executor is {name!r}: {problem}")
    return NativeExecutor(num_threads, has_byte_inputs=name == "native-8bit" or (name == "auto" and is_auto_8bit))
