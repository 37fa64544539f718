"""Memory that was freed and that the C library keeps for itself, and what the garbage collector looks through."""

from __future__ import annotations

import ctypes
import gc

# A step over 1 000 sessions makes some 50 000 objects that live until its end. With Python's own 700 they were looked
# through so often that it took 170 ms instead of 80.
_OBJECTS_BEFORE_COLLECTING = 10_000


def return_free_memory() -> None:
    """Give it to the system: after reading weights or a tokenizer it is tens of MiB. Only glibc can."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def settle_memory() -> None:
    """Called once a service serves: what lives as long as the process is never looked through again, which takes a
    tenth of a second each time, and new objects more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTING, *gc.get_threshold()[1:])
    return_free_memory()
