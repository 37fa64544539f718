"""Models by name: what this machine has, and which of it a command is to start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from easyspec.checkpoint.location import is_gguf, model_path, weight_bytes
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.errors import ConfigurationError, InvalidRequestError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

MODELS_VARIABLE = "EASYSPEC_MODELS"
TEXT_ONLY_NOTE = (
    "no --draft: guesses come from the text itself; a small model of the same vocabulary guesses more (--draft MODEL)"
)


@dataclass(frozen=True)
class NamedModel:
    """A model on this machine: its path, or its hub id, and the place it was found in."""

    name: str
    place: str
    path: Path | None = None

    @property
    def num_bytes(self) -> int | None:
        """Size of its weights; None for one in the hub's cache, which keeps them elsewhere."""
        return None if self.path is None else weight_bytes(self.path)


@dataclass(frozen=True)
class ModelChoice:
    """The models of a stack, the base's name, and a line about who drafts where that was not asked for."""

    base: Path
    base_name: str
    draft: Path | None
    drafts_from_text: bool = False
    note: str | None = None


def choose_models(
    model: str | None, base: str | None = None, draft: str | None = None, *, no_draft: bool = False
) -> ModelChoice:
    """The models that a command's arguments name. Hub ids are fetched.

    Without a draft model the bundled one drafts where it has the base's tokenizer, and elsewhere the text alone.
    Raises InvalidRequestError and ConfigurationError.
    """
    if model is not None and base is not None:
        raise InvalidRequestError("--base", base, f"unset where MODEL is given, which is {model!r}")
    named = model or base
    if named is None and not (DEFAULT_BASE / "config.json").is_file():
        raise ConfigurationError(
            "no model is named, and the bundled ones are not here; name one: a folder, a GGUF file or a hub id "
            "(`easyspec models` lists what this machine has)"
        )
    base_path = DEFAULT_BASE if named is None else find_model(named)
    base_name = base_path.name if named is None else model_name(named)
    if draft is not None:
        return ModelChoice(base_path, base_name, None if no_draft else find_model(draft))
    if no_draft:
        return ModelChoice(base_path, base_name, None)
    if named is None or _is_drafted_by(DEFAULT_DRAFT, base_path):
        return ModelChoice(base_path, base_name, DEFAULT_DRAFT)
    return ModelChoice(base_path, base_name, None, drafts_from_text=True, note=TEXT_ONLY_NOTE)


def find_model(named: str) -> Path:
    """The folder or GGUF file of a model: a path, a name that `named_models` has, or a hub id, which is fetched."""
    if not Path(named).expanduser().exists() and (known := named_models().get(named)) is not None and known.path:
        return known.path
    return model_path(named)


def model_name(named: str) -> str:
    """What requests call a model that was named so: the last part, without `.gguf`."""
    return Path(os.path.abspath(named)).name.removesuffix(".gguf")


def named_models() -> Mapping[str, NamedModel]:
    """The bundled models, those in the folder that EASYSPEC_MODELS names, and those in the hub's cache."""
    found: dict[str, NamedModel] = {}
    for folder, place in ((DEFAULT_BASE.parent, "bundled"), (os.environ.get(MODELS_VARIABLE), f"${MODELS_VARIABLE}")):
        if folder and Path(folder).is_dir():
            for path in sorted(Path(folder).iterdir()):
                if (path / "config.json").is_file() or (is_gguf(path) and path.is_file()):
                    name = model_name(str(path))
                    found.setdefault(name, NamedModel(name, place, path))
    for hub_id in _cached_hub_ids():
        found.setdefault(hub_id, NamedModel(hub_id, "hub cache"))
    return found


def _cached_hub_ids() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*--*")
    return sorted("/".join(folder.name.split("--")[1:3]) for folder in folders if any(folder.glob("snapshots/*/*")))


def _is_drafted_by(draft: Path, base: Path) -> bool:
    try:
        return tokenizer_fingerprint(draft) == tokenizer_fingerprint(base)
    except ConfigurationError:  # no bundled draft, or a base that will be refused by its own fault
        return False
