"""Turning a function over fixed buffers into one that can be replayed: CUDA graphs, and their twin for CPUs.

The twin replays by calling the function again. So everything but the capture itself is the same on a CPU: what is
copied where, how a pass is padded, which shape it takes. (CUDA graphs have not run yet, see docs/decisions/0018.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Body = Callable[[], None]

# Libraries choose kernels and make workspaces in the first calls, which must not be recorded.
_NUM_WARM_UPS = 2


class Recorder(Protocol):
    """Records bodies: functions that read and write memory which stays where it is, and never look at a value."""

    @property
    def held_bytes(self) -> int:
        """Memory that all recordings so far hold."""

    def record(self, body: Body) -> Body:
        """A replay of `body`, which runs a few times meanwhile.

        It reads and writes the same memory without holding it: the caller keeps `body` as long as the replay.
        """


class TwinRecorder:
    """Records nothing: a replay is the body."""

    held_bytes = 0

    def record(self, body: Body) -> Body:
        body()
        return body


class CudaGraphRecorder:
    """CUDA graphs that share one memory pool: what one of them needs in between, the next may overwrite.

    Replays must therefore run one after the other, on one stream, as the device thread's do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        self._free_bytes = torch.cuda.mem_get_info(device)[0]

    @property
    def held_bytes(self) -> int:
        # Of the whole GPU, as the driver's own memory for a graph's nodes is counted nowhere else.
        return max(0, int(self._free_bytes - torch.cuda.mem_get_info(self._device)[0]))

    def record(self, body: Body) -> Body:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                body()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile; their calls are none of ours.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            body()
        torch.cuda.empty_cache()  # of the warm-up, so that `held_bytes` tells the truth
        return graph.replay


def recorder_for(device: torch.device) -> Recorder:
    """CUDA graphs on a GPU, their twin elsewhere."""
    return CudaGraphRecorder(device) if device.type == "cuda" else TwinRecorder()
