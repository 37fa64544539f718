"""What torchrun tells its processes; read without importing torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def group_size() -> int:
    """Processes of this group; 1 for a process alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of this machine's devices is ours."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_follower() -> bool:
    """True for every process of a group but rank 0, which speaks to the outside."""
    return group_size() > 1 and os.environ.get("RANK", "0") != "0"


def die_with_launcher() -> None:
    """Under torchrun on Linux: be killed when it is, so that no rank is left behind."""
    if group_size() > 1 and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def torchrun_arguments(num_ranks: int) -> tuple[str, ...]:
    """What stands between the interpreter and `-m MODULE` to run a module on several ranks of this machine."""
    if num_ranks == 1:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
