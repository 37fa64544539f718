"""Which model a replica serves, as one digest: a session may move between replicas only if they agree on it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig
from easyspec.model.weights import checkpoint_files

_NUM_SAMPLES = 256
_SAMPLE_BYTES = 4096
# What the library that wrote a config.json leaves in it, and what is counted by its value in force instead.
_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def model_fingerprint(folder: Path, config: ModelConfig, executor: str = "", weights: str = "auto") -> str:
    """SHA-256 hex digest of what decides the tokens of the checkpoint in `folder`, run as `config` says.

    That is config.json without its notes, the type of the computation, end-of-sequence ids, the context length, the
    executor with its code path (others give other bits), the format that weights are brought to, and of every weight
    file its size, its header (of a GGUF file, which has the configuration in it) and 256 evenly spaced samples of
    4 KiB. Training changes weights everywhere, so two fine-tunes of a model differ; the whole of a large model would
    take minutes to read.
    Raises ConfigurationError if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        in_force = [str(config.dtype), sorted(config.eos_token_ids), config.max_model_len, executor, weights]
        if is_gguf(folder):
            digest.update(json.dumps(in_force).encode())
            digest.update(_sampled(folder, read_header(folder).data_start))
            return digest.hexdigest()
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name in _NOT_ARCHITECTURE:
            architecture.pop(name, None)
        digest.update(json.dumps([architecture, in_force], sort_keys=True).encode())
        for path in checkpoint_files(folder):
            with path.open("rb") as file:
                num_header_bytes = 8 + int.from_bytes(file.read(8), "little")
            digest.update(_sampled(path, num_header_bytes))
    except OSError as error:
        raise ConfigurationError(f"cannot read {folder}: {error}") from error
    return digest.hexdigest()


def _sampled(path: Path, num_header_bytes: int) -> bytes:
    """Digest of a file's size, header and samples."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        start = min(num_header_bytes, size)
        digest.update(file.read(start))
        for index in range(_NUM_SAMPLES):
            file.seek(start + (size - start) * index // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
