"""Text of the standard-library modules that no bundled model was trained on."""

from __future__ import annotations

import ast
import functools
import itertools
import random
import sysconfig
from pathlib import Path

HELDOUT_LIST = Path(__file__).with_name("heldout.txt")
_MIN_PROMPT_CHARS = 80


def held_out_modules() -> tuple[str, ...]:
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
    prompts = _function_prompts(max_chars)
    if num_prompts > len(prompts):
        raise ValueError(f"num_prompts must be at most {len(prompts)}, not {num_prompts}")
    return random.Random(seed).sample(prompts, num_prompts)


@functools.cache
def _function_prompts(max_chars: int) -> list[str]:
    prompts: set[str] = set()
    for source in held_out_texts().values():
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[0]
            # Up to the docstring's last line, or without one the signature's.
            end = first.end_lineno if ast.get_docstring(node) is not None else max(node.lineno, first.lineno - 1)
            head = lines[:end]
            lengths = itertools.accumulate(map(len, reversed(head)))
            num_kept = sum(length <= max_chars for length in lengths)
            prompts.add("".join(head[len(head) - num_kept :]).strip("\n").rstrip())
    return sorted(prompt for prompt in prompts if len(prompt) >= _MIN_PROMPT_CHARS)
