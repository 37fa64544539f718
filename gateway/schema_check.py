"""Whether a finished output is what its schema says: for those keywords that no grammar can enforce."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class UnenforcedSchema:
    """A schema as the client sent it, and the keywords that its grammar left out."""

    text: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class SchemaCheck:
    """What became of an output under a schema that could not be enforced whole. `is_valid` None: it was cut off."""

    keywords: tuple[str, ...]
    is_valid: bool | None
    reason: str = ""


def checked(output: str, schema: UnenforcedSchema) -> SchemaCheck:
    """Check a finished output; takes milliseconds, more for long lists."""
    # Imported here: most gateways never need it.
    import jsonschema
    from referencing import Registry

    try:
        content = json.loads(schema.text)
        # Patterns are enforced by the grammar, and would be matched here by backtracking, which can take for ever.
        kind = jsonschema.validators.extend(jsonschema.validators.validator_for(content), _WITHOUT_PATTERNS)
        error = jsonschema.exceptions.best_match(kind(content, registry=Registry()).iter_errors(json.loads(output)))
    except Exception as failure:  # of many types, where the schema is none or the output no JSON
        return SchemaCheck(schema.keywords, False, f"it cannot be checked: {failure}"[:_MAX_REASON_CHARS])
    if error is None:
        return SchemaCheck(schema.keywords, True)
    return SchemaCheck(schema.keywords, False, error.message[:_MAX_REASON_CHARS])


def _nothing(*_: Any) -> None:
    """A keyword that is not looked at."""


_WITHOUT_PATTERNS = {"pattern": _nothing, "patternProperties": _nothing}
