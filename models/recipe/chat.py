"""ChatML examples derived from documented functions and classes of the corpus."""

from __future__ import annotations

import ast
import random
import textwrap
from collections.abc import Iterator

from models.recipe.settings import CorpusSettings

# Tools are told in the system message, one JSON object a line, and calls written the way Hermes and Qwen models do. The
# pair never saw any in training; the template is here so that a request with tools can be rendered at all.
_TOOLS = (
    "{{ '<|im_start|>system\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ 'Functions you can call:\n<tools>\n' }}"
    "{% for tool in tools %}{{ (tool['function'] | tojson) + '\n' }}{% endfor %}"
    '{{ \'</tools>\nWrite a call as\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n\' }}'
)
_TOOL_CALLS = (
    "{% for call in message['tool_calls'] %}"
    "{{ '\n<tool_call>\n{\"name\": ' + (call['function']['name'] | tojson) }}"
    "{{ ', \"arguments\": ' + (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}"
)
CHAT_TEMPLATE = (
    f"{{% if tools %}}{_TOOLS}{{% endif %}}"
    "{% for message in messages %}"
    "{% if tools and loop.first and message['role'] == 'system' %}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    f"{{% if message['tool_calls'] %}}{_TOOL_CALLS}{{% endif %}}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SYSTEM = "You are a helpful Python programmer."
_SYSTEM_SHARE = 0.2
_EXPLAIN_SHARE = 0.25
_WRITE = (
    "Write a Python {kind} `{head}`. {doc}",
    "Implement `{head}` in Python. {doc}",
    "Please write the {kind} `{name}`. {doc}",
    "I need a Python {kind} called `{name}`. {doc}",
    "{doc}\n\nWrite this as a Python {kind} named `{name}`.",
    "Complete this Python {kind}:\n\n{head}",
)
_EXPLAIN = (
    "What does this Python {kind} do?\n\n{source}",
    "Explain this code:\n\n{source}",
    "Write a docstring for `{name}`:\n\n{source}",
)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def chat_documents(name: str, text: str, settings: CorpusSettings) -> Iterator[tuple[str, str]]:
    """Yield (name, ChatML text) for each documented definition of one source file. `name` seeds the choice of template,
    so a file's examples do not depend on other files. Yields nothing for a file that does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    choose = random.Random(f"{settings.seed}:{name}")
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            turn = _turn(node, lines, choose, settings)
            if turn is not None:
                question, answer = turn
                prefix = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n" if choose.random() < _SYSTEM_SHARE else ""
                yield f"{name}#{node.name}@{node.lineno}", f"{prefix}{chat_ml(question, answer)}"


def _turn(
    node: Definition, lines: list[str], choose: random.Random, settings: CorpusSettings
) -> tuple[str, str] | None:
    """Return (question, answer), or None where the definition is undocumented or too long."""
    doc = (ast.get_docstring(node) or "").strip()
    source = source_of(node, lines)
    paragraph = doc.split("\n\n")[0]
    too_long = len(source) > settings.max_chat_source_chars
    if not doc or too_long or len(paragraph) > settings.max_chat_docstring_chars:
        return None
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    if choose.random() < _EXPLAIN_SHARE and len(node.body) > 1:
        bare = bare_source_of(node, lines)
        return choose.choice(_EXPLAIN).format(kind=kind, name=node.name, source=bare), doc
    head = f"class {node.name}"
    if not isinstance(node, ast.ClassDef):
        head = f"def {node.name}({ast.unparse(node.args)})"
    fields = {"kind": kind, "name": node.name, "head": head, "doc": paragraph}
    return choose.choice(_WRITE).format(**fields).strip(), source


def source_of(node: Definition, lines: list[str]) -> str:
    return textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).strip()


def bare_source_of(node: Definition, lines: list[str]) -> str:
    """The same without its docstring, which it has."""
    first = node.body[0]
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno or first.lineno : node.end_lineno]]
    return textwrap.dedent("".join(kept)).strip()


def chat_ml(question: str, answer: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
