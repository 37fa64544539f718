"""What checkpoints are read, as the table of docs/checkpoints.md: made of what the readers and their tests go by."""

from __future__ import annotations

from easyspec.model.families import BLOCK_FORMATS, GGUF_MODEL_TYPES, QUANTIZATION_METHODS, SUPPORTED_MODEL_TYPES

_FLOATS = ("float32", "bfloat16", "float16")
# Architectures of llama.cpp that hold models of further families.
_ALSO_IN = {"mistral": "llama"}


def supported_table() -> str:
    """Markdown: families by formats."""
    rows = ["| | " + " | ".join(("safetensors", "quantized safetensors", "GGUF")) + " |", "|---|---|---|---|"]
    for family in SUPPORTED_MODEL_TYPES:
        architecture = next((name for name, type_ in GGUF_MODEL_TYPES.items() if type_ == family), _ALSO_IN.get(family))
        as_gguf = "-" if architecture is None else f"`{architecture}`: F32, F16, BF16, {', '.join(BLOCK_FORMATS)}"
        rows.append(f"| {family} | {', '.join(_FLOATS)} | {', '.join(QUANTIZATION_METHODS)} | {as_gguf} |")
    return "\n".join(rows)
