"""Held-out tasks that favour different guessers: code to write, documentation to go on with, text to copy from.

All text is of modules that no bundled model was trained on and no index of `bench sources` contains. Equal arguments
give equal tasks on one Python version.
"""

from __future__ import annotations

import ast
import functools
import random
import textwrap

from models.heldout import held_out_prompts, held_out_texts

TASK_NAMES = ("code", "prose", "copy")
_MIN_DOCSTRING_CHARS = 320
_FUNCTION_CHARS = (240, 900)
_CODE_PROMPT_CHARS = 600
# How much of the second copy stands in the prompt: enough to tell a small model what is going on.
_COPIED_SHARE = 0.35


def source_prompts(name: str, num_prompts: int, seed: int) -> list[str]:
    """`num_prompts` tasks of one kind; raises ValueError if there are fewer."""
    if name == "code":
        return held_out_prompts(num_prompts, seed, _CODE_PROMPT_CHARS)
    prompts = _prompts(name)
    if num_prompts > len(prompts):
        raise ValueError(f"num_prompts must be at most {len(prompts)} for {name}, not {num_prompts}")
    return random.Random(seed).sample(prompts, num_prompts)


@functools.cache
def _prompts(name: str) -> list[str]:
    """Prose: documentation, cut after a word in the middle. Copy: a function and the beginning of its edited copy; a
    document and the beginning of a quotation from it."""
    found: set[str] = set()
    for text in held_out_texts().values():
        nodes = [*ast.walk(ast.parse(text))]
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        found_in = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
        docstrings = [docstring for docstring in found_in if len(docstring) >= _MIN_DOCSTRING_CHARS]
        if name == "prose":
            found.update(docstring[: docstring.rindex(" ", 0, len(docstring) // 2)] for docstring in docstrings)
            continue
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                source = textwrap.dedent(ast.get_source_segment(text, node, padded=True) or "").strip()
                if _FUNCTION_CHARS[0] <= len(source) <= _FUNCTION_CHARS[1]:
                    edited = source.replace(node.name, f"{node.name}_checked", 1)
                    found.add(f"{source}\n\n# The same function under another name.\n{_beginning(edited)}")
        quotable = (docstring for docstring in docstrings if len(docstring) <= _FUNCTION_CHARS[1])
        found.update(f"{docstring}\n\nTo quote the above:\n\n{_beginning(docstring)}" for docstring in quotable)
    return sorted(found)


def _beginning(text: str) -> str:
    """The first part of a text, up to the end of a word."""
    end = int(len(text) * _COPIED_SHARE)
    return text[: max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))].rstrip()
