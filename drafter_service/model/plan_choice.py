"""How a draft model runs by default: on how many threads, and by which layer plan. Timed when the drafter starts.

Layer groups save what an engine spends between layers. How much that is depends on the draft model, the executor and
the number of threads, and a fuzzy step costs acceptance: a plan with groups must be clearly faster than the exact step.

Threads meet at every operation. A step of a small draft model takes less time on one thread, and leaves the others to
the rest of the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from easyspec.engine.segments import committed_segment
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import Segment, lay_out
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, sequential_plan
from easyspec.speculation.parameters import MlpPlacement

# A level of a tree of the usual width, behind a short text.
_NUM_ROWS = 4
_CONTEXT_TOKENS = 64
_NUM_TIMES = 15
_GROUP_SIZES = (2, 3, 4, 6)
# Groups of four layers lost up to 2 % of the hits of a level and 3 to 9 % of the agreement with the exact model in the
# prototype behind docs/decisions/0004; over a tree of five levels that is about what a step 1.15 times as fast wins.
MIN_SPEED_UP = 1.15
# What further threads must gain.
_MIN_THREADS_GAIN = 1.1


def candidate_plans(num_layers: int, mlp: MlpPlacement) -> list[LayerPlan]:
    """The sequential plan, then the paper's groups of several sizes that differ."""
    plans = [sequential_plan(num_layers)]
    for size in _GROUP_SIZES:
        if size <= num_layers and (plan := paper_plan(num_layers, size, mlp)) not in plans and not plan.is_sequential:
            plans.append(plan)
    return plans


def time_plans(
    decoder: Decoder, memory: KvMemory, plans: Sequence[LayerPlan], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The median time of a draft step by every plan, in ms, timed in turns; the memory is unused before and after."""
    num_rows = max(1, min(_NUM_ROWS, memory.num_available - _CONTEXT_TOKENS))
    num_context = min(_CONTEXT_TOKENS, decoder.config.max_model_len - 1, memory.num_available - num_rows)
    slots = SessionSlots(memory)
    slots.extend(num_context)
    text = committed_segment([0] * num_context, slots, range(num_context))
    decoder.forward(lay_out([text]), memory.pool)
    level_slots = memory.allocate(num_rows)
    level = Segment([0] * num_rows, [num_context] * num_rows, level_slots, [num_context] * num_rows, slots.by_position)
    layout = lay_out([level])
    times: list[list[float]] = [[] for _ in plans]
    for _ in range(_NUM_TIMES):
        for plan, taken in zip(plans, times, strict=True):
            started = clock()
            decoder.forward(layout, memory.pool, plan, range(num_rows))
            if decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
            taken.append(clock() - started)
    memory.free(level_slots)
    slots.release()
    # The first time compiles the plan's program.
    return [1e3 * statistics.median(taken[1:]) for taken in times]


def settle_threads(decoder: Decoder, memory: KvMemory, clock: Callable[[], float] = time.perf_counter) -> None:
    """Let passes run on one thread, or on all that the executor has where that is clearly faster."""
    executor, plans = decoder.executor, [decoder.sequential_plan]
    num_threads = executor.num_threads
    if num_threads == 1:
        return
    (together_ms,) = time_plans(decoder, memory, plans, clock)
    executor.use_threads(1)
    (alone_ms,) = time_plans(decoder, memory, plans, clock)
    if together_ms * _MIN_THREADS_GAIN < alone_ms:
        executor.use_threads(num_threads)


def fastest_plan(plans: Sequence[LayerPlan], step_ms: Sequence[float]) -> LayerPlan:
    """The fastest of `plans`, whose first is the sequential one; that one unless another is clearly faster."""
    best = min(range(len(plans)), key=lambda index: step_ms[index])
    return plans[best] if step_ms[best] * MIN_SPEED_UP <= step_ms[0] else plans[0]
