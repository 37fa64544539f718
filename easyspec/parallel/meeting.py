"""Where the processes of a group find each other, for the first time or again.

torchrun keeps its store when it restarts a group, and with it the addresses that the ranks of an earlier attempt left
there: a rank that reads one of them waits for a process that is gone. So each attempt agrees on a part of the store of
its own. Restarts cannot be counted for that: torchrun's machines count them differently.
"""

from __future__ import annotations

import datetime
import secrets
import time

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from easyspec.errors import ConfigurationError

_LEADER, _GO = "leader", "go"
_POLL_S = 0.02


def meet(timeout_s: float) -> tuple[Store, int, int]:
    """A store that is new to all ranks of this attempt, this rank and their number; all of them call it.

    Raises ConfigurationError if they are not all there in time, and what torch raises if there is no store.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    return agree(PrefixStore("easyspec", store), rank, size, timeout_s), rank, size


def agree(store: Store, rank: int, size: int, timeout_s: float) -> Store:
    """A part of `store` that only the present ranks know, whatever earlier ones have left in it.

    Rank 0 names the part. The others answer with a number of their own, and go where they find that number called.
    """
    deadline_s = time.monotonic() + timeout_s
    name = _lead(store, size, deadline_s) if rank == 0 else _follow(store, rank, deadline_s)
    return PrefixStore(name, store)


def _lead(store: Store, size: int, deadline_s: float) -> str:
    name = secrets.token_hex(8)
    store.set(_LEADER, name)
    answers = [f"{name}/{rank}" for rank in range(1, size)]
    while not store.check(answers):
        _wait(deadline_s, "the other ranks have not come")
    store.set(f"{name}/{_GO}", " ".join(store.get(answer).decode() for answer in answers))
    return name


def _follow(store: Store, rank: int, deadline_s: float) -> str:
    number = secrets.token_hex(8)
    name = ""
    while True:
        leader = store.get(_LEADER).decode() if store.check([_LEADER]) else ""
        if leader != name:
            name = leader
            store.set(f"{name}/{rank}", number)
        if name and store.check([f"{name}/{_GO}"]) and number in store.get(f"{name}/{_GO}").decode().split():
            return name
        _wait(deadline_s, "rank 0 has not come")


def _wait(deadline_s: float, why: str) -> None:
    if time.monotonic() > deadline_s:
        raise ConfigurationError(f"the ranks cannot meet: {why}")
    time.sleep(_POLL_S)
