"""Builds the native executor's library beside its Python code; everything else stands in pyproject.toml.

An installation without a C++ compiler still works: it says so, and runs on the reference executor.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_FOLDER = Path("easyspec/ops/cpp")
_SOURCES = [str(path) for path in sorted(_FOLDER.glob("*.cpp"))]
_OTHERS = [str(path) for path in sorted(_FOLDER.iterdir()) if str(path) not in _SOURCES]
_LIBRARY = Extension("easyspec.ops.libeasyspec", _SOURCES, depends=_OTHERS, optional=True)
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-ffunction-sections", "-w"]
# The C++ runtime is linked in, and hidden: torch brings one of its own into the same process. What the library does
# not use of it goes, because that asks for a newer glibc.
_LINK_FLAGS = ["-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,--gc-sections"]
_EXPORTS = f"-Wl,--version-script={_FOLDER / 'exports.map'}"
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
_FLAGS_OF_SOURCE = {
    "kernels_avx2": _AVX2,
    "kernels_avx512": _AVX512,
    "kernels_avx512_bf16": [*_AVX512, "-mavx512bf16"],
}
_GLIBC_VERSION = re.compile(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)")


class BuildLibrary(build_ext):
    """One shared library that Python opens by its C interface, so it suits every version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target, objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        target.unlink(missing_ok=True)
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            return _warn("no C++ compiler found (c++, g++ or clang++, or the variable CXX)")
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("EASYSPEC_CXXFLAGS", "").split()
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                built = list(pool.map(lambda source: _compile(compiler, Path(source), objects, extra), ext.sources))
            subprocess.run([compiler, *_LINK_FLAGS, _EXPORTS, *extra, *map(str, built), "-o", str(target)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            _warn(str(error))

    def get_outputs(self) -> list[str]:
        # What was not built is not there to be installed.
        return [path for path in super().get_outputs() if Path(path).exists()]


def _warn(reason: str) -> None:
    print(f"easyspec: {reason}; models will run on the slower reference executor", file=sys.stderr)


def _compile(compiler: str, source: Path, objects: Path, extra: list[str]) -> Path:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    own = _FLAGS_OF_SOURCE.get(source.stem, []) if is_x86 else []
    built = objects / f"{source.stem}.o"
    subprocess.run([compiler, *_FLAGS, *own, *extra, "-c", str(source), "-o", str(built)], check=True)
    return built


class Wheel(bdist_wheel):
    """Its name says what the library needs: any Python 3, this kind of processor, and the glibc of its symbols."""

    def get_tag(self) -> tuple[str, str, str]:
        library = Path(self.get_finalized_command("build_ext").get_ext_fullpath(_LIBRARY.name))
        if not library.exists():
            return "py3", "none", "any"
        _, _, system = super().get_tag()
        if system.startswith("linux_") and platform.libc_ver()[0] == "glibc":
            versions = _GLIBC_VERSION.findall(library.read_bytes())
            major, minor = max((int(major), int(minor)) for major, minor in versions)
            system = f"manylinux_{major}_{minor}_{platform.machine()}"
        return "py3", "none", system


setup(ext_modules=[_LIBRARY], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
