"""Errors of a device and of its memory, known by their words: this imports no torch."""

from __future__ import annotations

# What CUDA, its libraries and NCCL call an error of the device: the context is lost with it, and every later call
# fails. Memory that is full is another matter.
_STICKY = ("CUDA error", "HIP error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "NCCL error", "device-side assert")
_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_sticky(error: BaseException) -> bool:
    """Whether the device is lost with this error: an illegal access, a memory fault, a driver that is gone."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        is_named = type(cause).__name__ == "AcceleratorError" or any(words in text for words in _STICKY)
        if isinstance(cause, RuntimeError) and is_named and not any(words in text for words in _MEMORY):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had, of the device or the machine: with less to do it may do."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in _MEMORY):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
