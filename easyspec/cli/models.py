"""Models by name: what this machine has, and which of it a command is to start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from easyspec.checkpoint.location import is_gguf, model_path, weight_bytes
from easyspec.cli.packaged_models import PACKAGED_MODELS, SMOLLM2, fetch_model
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.cli.up import say
from easyspec.errors import ConfigurationError, InvalidRequestError
from easyspec.model.supported_models import BLOCK_FORMATS, GGUF_MODEL_TYPES, QUANTIZATION_METHODS, SUPPORTED_MODEL_TYPES
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

MODELS_VARIABLE = "EASYSPEC_MODELS"
TEXT_ONLY_NOTE = (
    "no --draft: guesses come from the text itself; a small model of the same vocabulary guesses more (--draft MODEL)"
)
BUNDLED_NOTE = (
    "no model is named: the small bundled pair, which completes Python and knows nothing else "
    f"(`easyspec fetch {SMOLLM2.name}` gets a real model, the default from then on)"
)
_FLOATS = ("float32", "bfloat16", "float16")
_WITH_MXFP4 = "gpt_oss"
# Architectures of llama.cpp that hold models of further families.
_ALSO_IN = {"mistral": "llama", "mixtral": "llama", "gemma3": "gemma3"}


@dataclass(frozen=True)
class NamedModel:
    """A model by its name, the place it was found in, and its path; a hub id and a package that was not fetched yet
    have none."""

    name: str
    place: str
    path: Path | None = None

    @property
    def num_bytes(self) -> int | None:
        """Size of its weights; None for one in the hub's cache, which keeps them elsewhere."""
        if self.path is not None:
            return weight_bytes(self.path)
        packaged = PACKAGED_MODELS.get(self.name)
        return None if packaged is None else packaged.num_bytes


@dataclass(frozen=True)
class ModelChoice:
    """The models of a stack, the base's name, and a line about the drafter where flags do not name it."""

    base: Path
    base_name: str
    draft: Path | None
    drafts_from_text: bool = False
    note: str | None = None


def choose_models(
    model: str | None, base: str | None = None, draft: str | None = None, *, no_draft: bool = False
) -> ModelChoice:
    """The models that a command's arguments name. Hub ids and packaged models are fetched.

    Without a base model it is the packaged one if it is here, else the bundled one. Without a draft model the bundled
    pair's drafts where it has the base's tokenizer, and elsewhere the text alone. The draft of SmolLM2 must be named:
    on two cores it brings no more than text does (models/smollm2-draft/README.md).
    Raises InvalidRequestError, ConfigurationError and UnavailableError.
    """
    if model is not None and base is not None:
        raise InvalidRequestError("--base", base, f"unset where MODEL is given, which is {model!r}")
    named = model or base or _default_name()
    base_path = find_model(named)
    base_name = model_name(named)
    if draft is not None:
        return ModelChoice(base_path, base_name, None if no_draft else find_model(draft))
    note = BUNDLED_NOTE if model is base is None and base_path == DEFAULT_BASE else None
    if no_draft:
        return ModelChoice(base_path, base_name, None, note=note)
    with contextlib.suppress(ConfigurationError):  # no such draft, or a base that will be refused
        if tokenizer_fingerprint(DEFAULT_DRAFT) == tokenizer_fingerprint(base_path):
            return ModelChoice(base_path, base_name, DEFAULT_DRAFT, note=note)
    return ModelChoice(base_path, base_name, None, drafts_from_text=True, note=TEXT_ONLY_NOTE)


def _default_name() -> str:
    if SMOLLM2.is_here:
        return SMOLLM2.name
    if not (DEFAULT_BASE / "config.json").is_file():
        raise ConfigurationError(
            f"no model is named, and the bundled ones are not here; name one: a folder, a GGUF file, a hub id or "
            f"{SMOLLM2.name}, which is fetched (`easyspec models` lists what this machine has)"
        )
    return str(DEFAULT_BASE)


def find_model(named: str) -> Path:
    """The folder or GGUF file of a model: a path, a name that `named_models` has, or a hub id.

    Hub ids and packaged models are fetched. Raises ConfigurationError and UnavailableError.
    """
    if not Path(named).expanduser().exists():
        if named in PACKAGED_MODELS:
            return fetch_model(PACKAGED_MODELS[named], say)
        if (known := named_models().get(named)) is not None and known.path:
            return known.path
    return model_path(named)


def model_name(named: str) -> str:
    """What requests call a model that was named so: the last part, without `.gguf`."""
    return Path(os.path.abspath(named)).name.removesuffix(".gguf")


def named_models() -> Mapping[str, NamedModel]:
    """The bundled models, the packaged ones, those in the folder that EASYSPEC_MODELS names, and what other
    programs keep in their caches: the hub's, llama.cpp's, LM Studio's."""
    found: dict[str, NamedModel] = {}

    def add(models: Mapping[str, Path], place: str) -> None:
        for name, path in models.items():
            found.setdefault(name, NamedModel(name, place, path))

    add(_models_in(DEFAULT_BASE.parent), "bundled")
    for packaged in PACKAGED_MODELS.values():
        place = packaged.requirement if packaged.is_here else f"{packaged.requirement}, fetched when named"
        found[packaged.name] = NamedModel(packaged.name, place, packaged.path if packaged.is_here else None)
    if own := os.environ.get(MODELS_VARIABLE):
        add(_models_in(Path(own)), f"${MODELS_VARIABLE}")
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*--*")
    for folder in sorted(folder for folder in folders if any(folder.glob("snapshots/*/*"))):
        hub_id = "/".join(folder.name.split("--")[1:3])
        found.setdefault(hub_id, NamedModel(hub_id, "hub cache"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    add(_gguf_files_in(Path(os.environ.get("LLAMA_CACHE") or cache / "llama.cpp")), "llama.cpp's cache")
    for folder in (Path.home() / ".lmstudio" / "models", cache / "lm-studio" / "models"):
        add(_gguf_files_in(folder), "LM Studio")
    return found


def _models_in(folder: Path) -> dict[str, Path]:
    """Checkpoint folders, GGUF files, and folders of one GGUF file, right in a folder, by name."""
    models: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        files = list(path.glob("*.gguf"))
        if (path / "config.json").is_file() or (is_gguf(path) and path.is_file()):
            models[model_name(str(path))] = path
        elif len(files) == 1:
            models[path.name] = files[0]
    return models


def _gguf_files_in(folder: Path) -> dict[str, Path]:
    """GGUF files in a folder and those below it, by name, without the parts of models that read pictures."""
    paths = sorted(path for path in folder.glob("**/*.gguf") if "mmproj" not in path.name)
    return {model_name(str(path)): path for path in paths}


def supported_table() -> str:
    """What checkpoints are read, as the Markdown table of docs/checkpoints.md: families by formats."""
    rows = ["| | " + " | ".join(("safetensors", "quantized safetensors", "GGUF")) + " |", "|---|---|---|---|"]
    for family in SUPPORTED_MODEL_TYPES:
        architecture = next((name for name, type_ in GGUF_MODEL_TYPES.items() if type_ == family), _ALSO_IN.get(family))
        blocks = [name for name in BLOCK_FORMATS if name != "MXFP4" or family == _WITH_MXFP4]
        # gpt-oss keeps all experts in one tensor, which other ways of quantizing do not.
        methods = [method for method in QUANTIZATION_METHODS if (method == "mxfp4") == (family == _WITH_MXFP4)]
        as_gguf = "-" if architecture is None else f"`{architecture}`: F32, F16, BF16, {', '.join(blocks)}"
        rows.append(f"| {family} | {', '.join(_FLOATS)} | {', '.join(methods)} | {as_gguf} |")
    return "\n".join(rows)
