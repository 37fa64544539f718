"""What the decoder supports, for those who must know without loading a model."""

from __future__ import annotations

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# By llama.cpp's names of architectures, whose `llama` holds Mistral's models too.
GGUF_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Formats of blocks in GGUF files.
BLOCK_FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# As `quant_method` names them.
QUANTIZATION_METHODS = ("compressed-tensors", "gptq", "awq", "fp8")
SUPPORTED_ACTIVATIONS = ("silu", "swish")
