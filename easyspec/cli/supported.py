"""What checkpoints are read, as the table of docs/checkpoints.md: made of what the readers and their tests go by."""

from __future__ import annotations

from easyspec.model.supported_models import BLOCK_FORMATS, GGUF_MODEL_TYPES, QUANTIZATION_METHODS, SUPPORTED_MODEL_TYPES

_FLOATS = ("float32", "bfloat16", "float16")
_WITH_MXFP4 = "gpt_oss"
# Architectures of llama.cpp that hold models of further families.
_ALSO_IN = {"mistral": "llama", "mixtral": "llama", "gemma3": "gemma3"}


def supported_table() -> str:
    """Markdown: families by formats."""
    rows = ["| | " + " | ".join(("safetensors", "quantized safetensors", "GGUF")) + " |", "|---|---|---|---|"]
    for family in SUPPORTED_MODEL_TYPES:
        architecture = next((name for name, type_ in GGUF_MODEL_TYPES.items() if type_ == family), _ALSO_IN.get(family))
        blocks = [name for name in BLOCK_FORMATS if name != "MXFP4" or family == _WITH_MXFP4]
        # gpt-oss keeps all experts in one tensor, which other ways of quantizing do not.
        methods = [method for method in QUANTIZATION_METHODS if (method == "mxfp4") == (family == _WITH_MXFP4)]
        as_gguf = "-" if architecture is None else f"`{architecture}`: F32, F16, BF16, {', '.join(blocks)}"
        rows.append(f"| {family} | {', '.join(_FLOATS)} | {', '.join(methods)} | {as_gguf} |")
    return "\n".join(rows)
