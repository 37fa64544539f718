"""What setup.py makes: a wheel with the library that fits its name, or one without, and the source archive."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
LIBRARY = "easyspec/ops/libeasyspec.so"
# Writes what names the symbols of two versions of glibc to the file behind -o.
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
printf 'x\\0GLIBC_2.2.5\\0GLIBC_2.17\\0GLIBC_PRIVATE\\0' > "$2"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the library is built of, and some of the Python code."""
    folder = tmp_path / "tree"
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(CHECKOUT / "easyspec/ops", folder / "easyspec/ops", ignore=without)
    for name in ("setup.py", "pyproject.toml", "easyspec/__init__.py"):
        shutil.copy(CHECKOUT / name, folder / name)
    return folder


def build(tree: Path, *commands: str, **variables: str) -> str:
    """Run setup.py with these variables and return what it says."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "EASYSPEC_CXXFLAGS")}
    command = [sys.executable, "setup.py", "-q", *commands]
    built = subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True, check=True)
    return built.stdout + built.stderr


def wheel_in(tree: Path) -> Path:
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def test_a_wheel_is_named_after_the_glibc_that_its_library_needs(tree: Path) -> None:
    compiler = tree / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    build(tree, "bdist_wheel", CXX=str(compiler))
    assert wheel_in(tree).name == f"easyspec-0.1.0-py3-none-manylinux_2_17_{os.uname().machine}.whl"
    names = zipfile.ZipFile(wheel_in(tree)).namelist()
    assert LIBRARY in names
    assert "easyspec/ops/executor.py" in names
    assert not [name for name in names if "cpp" in name]


@pytest.mark.parametrize("compiler", [None, "false", "/no/such/compiler"])
def test_without_a_compiler_that_works_the_wheel_has_no_library_and_the_build_says_so(
    tree: Path, tmp_path: Path, compiler: str | None
) -> None:
    variables = {"PATH": str(tmp_path)} if compiler is None else {"CXX": compiler}
    said = build(tree, "bdist_wheel", **variables)
    assert "models will run on the slower reference executor" in said
    assert ("no C++ compiler found" in said) == (compiler is None)
    assert wheel_in(tree).name == "easyspec-0.1.0-py3-none-any.whl"
    assert LIBRARY not in zipfile.ZipFile(wheel_in(tree)).namelist()


def test_without_a_compiler_there_is_an_editable_installation_too(tree: Path, tmp_path: Path) -> None:
    said = build(tree, "editable_wheel", "--dist-dir", "dist", PATH=str(tmp_path))
    assert "no C++ compiler found" in said
    assert wheel_in(tree).name == "easyspec-0.1.0-0.editable-py3-none-any.whl"
    assert not (tree / LIBRARY).exists()


def test_the_source_archive_has_all_that_the_library_is_built_of(tree: Path) -> None:
    build(tree, "sdist")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    assert {path.relative_to(CHECKOUT) for path in (CHECKOUT / "easyspec/ops/cpp").iterdir()} <= names


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_library_of_a_wheel_loads_and_brings_its_own_runtime(tree: Path) -> None:
    build(tree, "bdist_wheel")
    zipfile.ZipFile(wheel_in(tree)).extract(LIBRARY, tree / "installed")
    library = tree / "installed" / LIBRARY
    assert ctypes.CDLL(str(library)).easyspec_best_path() in (0, 1, 2)
    assert b"libstdc++.so" not in library.read_bytes()
