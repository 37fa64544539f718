"""Runs a function in several processes that form a torch.distributed group over gloo, and collects the results."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from easyspec.cli.free_ports import free_port

_TIMEOUT_S = 240.0
_LEAVING_S = 5.0


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)`, a module-level function, in every rank; results by rank. Raises what a rank raised."""
    port = free_port("127.0.0.1")
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(num_ranks):
            here, there = context.Pipe(duplex=False)
            target = (function.__module__, function.__qualname__, arguments, rank, num_ranks, port, there)
            process = context.Process(target=_run, args=target, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        results = _receive_all(pipes)
        for process in processes:
            process.join(_LEAVING_S)
        return results
    finally:
        for process in processes:
            process.kill()  # nothing, where it has ended
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()


def _receive_all(pipes: list[Connection]) -> list[Any]:
    """Results by rank; the first error that comes is raised at once, whatever the other ranks are doing."""
    results: dict[int, Any] = {}
    deadline_s = time.monotonic() + _TIMEOUT_S
    while len(results) < len(pipes):
        missing = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(missing), max(deadline_s - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(f"ranks {list(missing.values())} said nothing for {_TIMEOUT_S:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            results[missing[pipe]] = _receive(missing[pipe], pipe)
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, pipe: Connection) -> Any:
    try:
        is_result, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if not is_result:
        raise RuntimeError(f"rank {rank} raised\n{value}")
    return pickle.loads(value)


def _run(module: str, name: str, arguments: Any, rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    from easyspec.parallel.launch import die_with_parent

    die_with_parent()  # also where that is killed, and cannot end this process in an orderly way
    import torch

    torch.set_num_threads(1)
    try:
        function = getattr(importlib.import_module(module), name)
        # Pickled here: torch would send tensors by handles that die with this process.
        pipe.send((True, pickle.dumps(function(*arguments))))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        from easyspec.parallel.ranks import leave_group

        leave_group()
