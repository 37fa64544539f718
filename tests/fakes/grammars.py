"""Random grammars whose languages are small enough to be finished."""

from __future__ import annotations

import json
import random
from typing import Any

from easyspec.speculation.parameters import Grammar, GrammarKind

PATTERNS = (
    "(range|return|print){2,4}( [a-z]{1,3})?",
    "[0-9]{1,12}",
    "(ab|ba){1,5}c",
    "é{1,3}😀?",
    "[^a-z]{5}",
    "[a-f]+@(x|yy)[.](com|org)",
    r"-?(0|[1-9]\d{0,5})([.]\d{1,3})?",
    "(a|b|cd|)((x|y){0,3}z)?",
    r"\w{1,6}(, \w{1,6}){0,2}[.]",
)


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of any kind, nested up to `depth` levels."""
    kinds = ["integer", "string", "boolean", "enum", "null", "pattern", "number"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * 2 if depth else kinds)
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 9}
    if kind == "string":
        shortest = rng.randrange(3)
        return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randrange(5)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", "^(yes|no)$", r"^\d{2}-\d{2}$"])}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 3, None, True, "a b", "é"], rng.randrange(1, 4))}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randrange(1, 4)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "object":
        names = rng.sample(["name", "n", "range", "is ok", "é"], rng.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": names[: rng.randrange(len(names) + 1)],
            "additionalProperties": False,
        }
    return {"type": kind}


def random_grammar(rng: random.Random) -> Grammar:
    """A schema half of the time, else a regex or the same in Lark."""
    if rng.random() < 0.5:
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(random_schema(rng)))
    pattern = rng.choice(PATTERNS)
    if rng.random() < 0.5:
        return Grammar(GrammarKind.REGEX, pattern)
    return Grammar(GrammarKind.LARK, f"start: TEXT\nTEXT: /{pattern}/")
