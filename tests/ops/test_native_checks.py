"""The C++ checks in tests/ops/cpp: kernels against double precision, passes on many threads, both under sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
LIBRARY = CHECKOUT / "easyspec" / "ops" / "cpp"
CHECKS = Path(__file__).parent / "cpp"
COMPILER = shutil.which("c++") or "c++"
FLAGS = ("-std=c++20", "-g", "-pthread", "-ffp-contract=off", "-Wno-psabi", f"-I{LIBRARY}")
AVX2 = ("-mavx2", "-mfma", "-mf16c") if platform.machine() == "x86_64" else ()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


def compile_check(folder: Path, check: Path, *flags: str, sources: Sequence[Path] | None = None) -> Path:
    """A program of one check and the library's sources."""

    def compile_one(source: Path) -> Path:
        built = folder / f"{source.stem}.o"
        own = AVX2 if source.stem in ("kernels_avx2", "avx512_by_simde") else ()
        subprocess.run([COMPILER, *FLAGS, *flags, *own, "-c", source, "-o", built], check=True)
        return built

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [check, *(sources or sorted(LIBRARY.glob("*.cpp")))]))
    subprocess.run([COMPILER, *FLAGS, *flags, *objects, "-o", folder / "check"], check=True)
    return folder / "check"


def run(check: Path, **variables: str) -> str:
    ended = subprocess.run([check], env=os.environ | variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


@pytest.mark.parametrize("name", ["check_kernels", "check_programs"])
def test_checks_are_sound_in_memory_and_arithmetic(tmp_path: Path, name: str) -> None:
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    assert "path 0: sound" in run(compile_check(tmp_path, CHECKS / f"{name}.cpp", *flags))


def test_threads_of_a_pass_do_not_race(tmp_path: Path) -> None:
    check = compile_check(tmp_path, CHECKS / "check_programs.cpp", "-O1", "-fsanitize=thread")
    assert "sound" in run(check, ONLY_BEST_PATH="1")


@pytest.mark.skipif(not AVX2, reason="SIMDe runs AVX512 by AVX2, which is x86")
@pytest.mark.skipif(not Path("/usr/include/simde/x86/avx512.h").exists(), reason="SIMDe is missing (libsimde-dev)")
def test_the_avx512_path_is_right_where_no_processor_has_it(tmp_path: Path) -> None:
    sources = [path for path in sorted(LIBRARY.glob("*.cpp")) if path.stem != "kernels_avx512_bf16"]
    check = compile_check(
        tmp_path,
        CHECKS / "check_kernels.cpp",
        "-O1",
        "-DEMULATES_AVX512",
        sources=[*sources, CHECKS / "avx512_by_simde.cpp"],
    )
    assert "path 3: sound" in run(check)
