"""What every result file says of where, when and with which weights it was measured."""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.machine import REPOSITORY, describe_machine
from easyspec.checkpoint.location import is_gguf
from models.recipe.settings import MODELS

BUNDLED = tuple(MODELS / name for name in ("base", "draft", "base-small"))
_NUM_DIGITS = 12
_BLOCK_BYTES = 1 << 22


def provenance(checkpoints: Sequence[Path], commit: str) -> dict[str, Any]:
    """The fields `machine`, `commit`, `date` and `weights` of a result file, the last a digest by checkpoint folder.
    Without `checkpoints` the services were running before, and their weights are not known. `commit` is that of the
    time before measuring: a benchmark may draw its own plot into the tree."""
    return {
        "machine": describe_machine(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "weights": {_name(folder): weights_digest(folder) for folder in checkpoints},
    }


@functools.cache
def weights_digest(folder: Path) -> str:
    """The beginning of the SHA-256 of a folder's safetensors files, or of a GGUF file; neither changes meanwhile."""
    digest = hashlib.sha256()
    for path in [folder] if is_gguf(folder) else sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:_NUM_DIGITS]


def provenance_lines(report: Mapping[str, Any]) -> list[str]:
    """The same as Markdown, and whether bundled checkpoints have changed since."""
    machine, weights = report["machine"], report.get("weights", {})
    lines = [
        f"* command: `{report['command']}`",
        f"* machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"torch {machine['torch']}, Python {machine['python']}"
        # Reports from before there were executors do not name one.
        + (f", {machine['executor']}" if "executor" in machine else ""),
        f"* commit {report['commit']}, {report['date']}",
    ]
    if weights:
        lines.append("* weights: " + ", ".join(f"{name} {digest}" for name, digest in weights.items()))
    if any(weights_digest(folder) != weights.get(_name(folder), weights_digest(folder)) for folder in BUNDLED):
        lines.append("* **the bundled models have been trained further since**; these figures are of the earlier ones")
    return lines


def _name(folder: Path) -> str:
    """Below the repository where it is there, to be the same on every machine."""
    folder = folder.resolve()
    return folder.relative_to(REPOSITORY).as_posix() if folder.is_relative_to(REPOSITORY) else folder.name
