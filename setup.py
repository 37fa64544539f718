"""Builds the native executor's library beside its Python code; everything else stands in pyproject.toml.

An installation without a C++ compiler still works: it says so, and runs on the reference executor.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_SOURCES = Path("easyspec/ops/cpp")
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden", "-w"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16"))]


class BuildLibrary(build_ext):
    """One shared library that Python opens by its C interface, so it suits every version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            print("easyspec: no C++ compiler found; models will run on the slower reference executor", file=sys.stderr)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("EASYSPEC_CXXFLAGS", "").split()
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                built = list(
                    pool.map(lambda source: _compile(compiler, source, objects, extra), sorted(_SOURCES.glob("*.cpp")))
                )
            subprocess.run([compiler, "-shared", "-pthread", *extra, *map(str, built), "-o", str(target)], check=True)
        except subprocess.CalledProcessError as error:
            print(f"easyspec: {error}; models will run on the slower reference executor", file=sys.stderr)


def _compile(compiler: str, source: Path, objects: Path, extra: list[str]) -> Path:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    own = {"kernels_avx2": _AVX2, "kernels_avx512": _AVX512}.get(source.stem, []) if is_x86 else []
    built = objects / f"{source.stem}.o"
    subprocess.run([compiler, *_FLAGS, *own, *extra, "-c", str(source), "-o", str(built)], check=True)
    return built


setup(
    ext_modules=[Extension("easyspec.ops.libeasyspec", [str(path) for path in sorted(_SOURCES.glob("*.cpp"))])],
    cmdclass={"build_ext": BuildLibrary},
)
