"""Which reader a model's weights need."""

from __future__ import annotations

from pathlib import Path

from easyspec.checkpoint.location import is_gguf
from easyspec.model.fused_experts import FusedExperts, has_fused_experts
from easyspec.model.gguf_file import GgufCheckpoint
from easyspec.model.quantization.announced import read_quantization
from easyspec.model.weights import Checkpoint, TensorSource


def open_weights(path: Path, *, is_whole: bool = False, reads_values: bool = True) -> TensorSource:
    """The tensors of a folder or a GGUF file; with `is_whole` all must be asked for. Raises ConfigurationError.

    Of a folder, without `reads_values`, only headers are read.
    """
    if is_gguf(path):
        return GgufCheckpoint(path, is_whole=is_whole)
    checkpoint = Checkpoint(path, is_whole=is_whole, quantization=read_quantization(path), reads_values=reads_values)
    return FusedExperts(checkpoint) if has_fused_experts(checkpoint) else checkpoint
