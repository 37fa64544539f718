"""What the decoder supports, for code that must know without loading a model."""

from __future__ import annotations

SUPPORTED_MODEL_TYPES = (
    "llama",
    "mistral",
    "mistral3",
    "ministral3",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gpt_oss",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "phi3",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "glm4",
    "cohere2",
    "seed_oss",
    "hunyuan_v1_dense",
    "ernie4_5",
    "exaone4",
    "starcoder2",
)
# Models of text and pictures, of which the text tower is run.
TOWER_MODEL_TYPES = ("mistral3", "gemma3")
# By llama.cpp's names of architectures, whose `llama` holds Mistral's models too, and Mixtral's.
GGUF_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
}
# Formats of blocks in GGUF files.
BLOCK_FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
# As `quant_method` names them.
QUANTIZATION_METHODS = ("compressed-tensors", "gptq", "awq", "fp8", "mxfp4")
SUPPORTED_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh", "gelu_new")
