"""Text of the standard-library modules that no bundled model was trained on."""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELDOUT_LIST = Path(__file__).with_name("heldout.txt")
_MIN_PROMPT_CHARS = 80


def held_out_modules() -> tuple[str, ...]:
    """Return the held-out module names in the order of `heldout.txt`."""
    return tuple(HELDOUT_LIST.read_text(encoding="utf-8").split())


def held_out_texts() -> dict[str, str]:
    """Return name -> source of each held-out module the running interpreter has."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    paths = {name: stdlib / f"{name}.py" for name in held_out_modules()}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}


def held_out_prompts(num_prompts: int, seed: int, max_chars: int) -> list[str]:
    """Return beginnings of held-out code, cut where a programmer would want a completion.

    A prompt ends after a function's head and docstring, never in white space (a trailing newline
    would be tokenised differently from the same newline in running text). It reaches back over
    whole lines for as much as fits `max_chars` (at least 80). Equal arguments give equal prompts
    on one Python version. Raises ValueError if fewer than `num_prompts` places exist.
    """
    if max_chars < _MIN_PROMPT_CHARS:
        raise ValueError(f"max_chars must be at least {_MIN_PROMPT_CHARS}, not {max_chars}")
    prompts = _all_function_prompts(max_chars)
    if num_prompts > len(prompts):
        raise ValueError(f"num_prompts must be at most {len(prompts)}, not {num_prompts}")
    return random.Random(seed).sample(prompts, num_prompts)


@functools.cache
def _all_function_prompts(max_chars: int) -> list[str]:
    return sorted({prompt for source in held_out_texts().values() for prompt in _function_prompts(source, max_chars)})


def _function_prompts(source: str, max_chars: int) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            prompt = _tail_of_lines(lines[: _last_head_line(node)], max_chars)
            if len(prompt) >= _MIN_PROMPT_CHARS:
                yield prompt


def _last_head_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the 1-based line where the docstring, or without one the signature, ends."""
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        return first.end_lineno or first.lineno
    return max(node.lineno, first.lineno - 1)


def _tail_of_lines(lines: list[str], max_chars: int) -> str:
    kept: list[str] = []
    num_chars = 0
    for line in reversed(lines):
        num_chars += len(line)
        if num_chars > max_chars:
            break
        kept.append(line)
    return "".join(reversed(kept)).strip("\n").rstrip()
