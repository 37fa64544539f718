"""The C++ library of the native executor: where it is, whether it loads, and its functions and structures.

The structures mirror easyspec/ops/cpp/api.h.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

_PATH_VARIABLE = "EASYSPEC_CODE_PATH"
LIBRARY = Path(__file__).parent / "libeasyspec.so"


class CodePath(enum.IntEnum):
    """Instructions that the kernels use."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3


def widens_bfloat16(executor: str) -> bool:
    """Whether an executor of this name multiplies bfloat16 weights in float32, as its instructions know no bfloat16.

    The weights and the KV memory stay bfloat16, and are read at that size; no product is rounded.
    """
    name = executor.removesuffix("-8bit")
    return name.startswith("native-") and name != f"native-{CodePath.AVX512_BF16.name.lower()}"


class Packed(Structure):
    """A packed weight."""

    _fields_ = [
        ("data", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("format", c_int32),
        ("scale_type", c_int32),
        ("has_minimum", c_int32),
        ("has_half_scales", c_int32),
        ("has_byte_inputs", c_int32),
    ]


class Op(Structure):
    """One operation of a program."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "layer", "input", "output", "adds", "activation")),
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "window")),
        *((name, c_int32) for name in ("num_parts", "column", "width", "is_part", "is_centred", "is_norm_last")),
        *((name, c_int32) for name in ("routes", "num_experts", "num_chosen", "is_normalised")),
        *((name, c_float) for name in ("eps", "factor", "soft_cap")),
        *((name, c_void_p) for name in ("weight", "second", "bias", "second_bias", "norm", "second_norm")),
        *((name, c_void_p) for name in ("cosines", "sines", "sinks", "parts", "outputs")),
        *((name, c_void_p) for name in ("experts", "second_experts", "expert_biases", "second_expert_biases")),
    ]


class Pass(Structure):
    """The rows of a pass and its memory."""

    _fields_ = [
        ("num_rows", c_int64),
        ("num_selected", c_int64),
        *((name, c_void_p) for name in ("token_ids", "positions", "slots", "selected_rows", "segment_of_row")),
        *((name, c_void_p) for name in ("committed", "num_committed", "extra", "first_extra")),
        *((name, c_void_p) for name in ("buffers", "keys", "values")),
        *((name, c_int64) for name in ("num_slots", "slot_bytes", "kv_format")),
        *((name, c_int64) for name in ("num_tokens", "num_positions", "num_written_slots")),
    ]


class Choice(Structure):
    """Where a token is to be chosen, and how."""

    _fields_ = [
        ("logits", c_void_p),
        ("vocab_size", c_int64),
        ("seed", c_uint64),
        ("position", c_int64),
        ("top_p", c_double),
        *((name, c_float) for name in ("temperature", "min_p", "repetition", "presence", "frequency")),
        ("top_k", c_int32),
        *((name, c_void_p) for name in ("bias_ids", "bias_values")),
        ("num_biased", c_int64),
        *((name, c_void_p) for name in ("seen_ids", "counts")),
        ("num_seen", c_int64),
        *((name, c_void_p) for name in ("path_ids", "path_slots")),
        ("num_path", c_int64),
        ("allowed_bits", c_void_p),
    ]


@functools.cache
def load() -> ctypes.CDLL:
    """The library; raises OSError where it was not built, does not load, or was built from other sources."""
    library = ctypes.CDLL(str(LIBRARY))
    signatures = {
        "easyspec_best_path": (c_int32, ()),
        "easyspec_packed_bytes": (c_int64, (POINTER(Packed),)),
        "easyspec_pack_dense": (None, (POINTER(Packed), c_void_p, c_int32, c_int64)),
        "easyspec_pack_codes": (None, (POINTER(Packed), c_void_p, c_void_p, c_void_p)),
        "easyspec_unpack_row": (None, (POINTER(Packed), c_int64, c_void_p)),
        "easyspec_engine_new": (c_void_p, (c_int32, c_int32)),
        "easyspec_engine_use_threads": (None, (c_void_p, c_int32)),
        "easyspec_engine_free": (None, (c_void_p,)),
        "easyspec_program_new": (c_void_p, (c_void_p, POINTER(Op), c_int64, c_void_p, c_void_p, c_int64)),
        "easyspec_program_free": (None, (c_void_p,)),
        "easyspec_program_run": (c_int32, (c_void_p, POINTER(Pass))),
        "easyspec_choose": (c_int64, (c_void_p, POINTER(Choice))),
        "easyspec_log_sum": (c_double, (c_void_p, c_void_p, c_int64)),
        "easyspec_rank": (
            None,
            (c_void_p, c_void_p, *[c_int64] * 3, *[c_void_p] * 4, c_int64, c_int64, c_void_p, c_void_p),
        ),
        "easyspec_program_num_phases": (c_int64, (c_void_p,)),
    }
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OSError(f"{LIBRARY} has no {name}: it was built from other sources, install easyspec again") from None
        function.restype, function.argtypes = result, arguments
    return library


def library_problem() -> str | None:
    """Why the native executor cannot run here, or None."""
    try:
        load()
    except OSError as error:
        return f"its library was not built, which needs a C++ compiler when easyspec is installed ({error})"
    return None


def best_path() -> CodePath:
    """The fastest code path of this processor, or the slower one that EASYSPEC_CODE_PATH names."""
    best = CodePath(load().easyspec_best_path())
    wanted = os.environ.get(_PATH_VARIABLE)
    if wanted is None:
        return best
    names = {path.name.lower(): path for path in CodePath if path <= best}
    if wanted not in names:
        raise ValueError(f"{_PATH_VARIABLE} is {wanted!r}; allowed here: {', '.join(names)}")
    return names[wanted]
