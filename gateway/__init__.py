"""The gateway: tokenizer, request, client connection; no model."""
