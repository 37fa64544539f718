"""What torchrun tells its processes; read without importing torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# The exit code of a process whose device or group is lost: its supervisor starts it again.
EXIT_LOST = 3
# And one whose device does not answer.
EXIT_HUNG = 4
_PR_SET_PDEATHSIG = 1


def group_size() -> int:
    """Processes of this group; 1 for a process alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of this machine's devices is ours."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_one_machine() -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE", group_size())) == group_size()


def master_host() -> str:
    """Where the processes of this group meet."""
    return os.environ.get("MASTER_ADDR", "localhost")


def is_follower() -> bool:
    """True for every process of a group but rank 0, which speaks to the outside."""
    return group_size() > 1 and os.environ.get("RANK", "0") != "0"


def die_with_launcher() -> None:
    """Under torchrun on Linux: be killed when it is, so that no rank is left behind."""
    if group_size() > 1:
        die_with_parent()


def die_with_parent() -> None:
    """On Linux: be killed when the process that started this one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def torchrun_arguments(num_ranks: int) -> tuple[str, ...]:
    """What stands between the interpreter and `-m MODULE` to run a module on several ranks of this machine."""
    if num_ranks == 1:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
