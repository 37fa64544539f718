"""Quantized weights in safetensors: the formats' written rules, and nothing of their libraries."""
