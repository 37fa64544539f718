"""The OpenAI-compatible REST shim; `docs/openai-compat.md` lists every field. Knows neither grpc nor torch."""
