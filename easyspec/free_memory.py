"""Memory that was freed and that the C library keeps for itself."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Give it to the system: after reading weights or a tokenizer it is tens of MiB. Only glibc can."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
