"""Whether a finished output is what its schema says: for those keywords that no grammar can enforce."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from easyspec.speculation.schemas import is_beyond_grammars

_MAX_REASON_CHARS = 300
_PATTERN_TIMEOUT_S = 0.5


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
        # The latest for a dialect that the library does not know; without a default it would warn.
        found = jsonschema.validators.validator_for(content, default=jsonschema.Draft202012Validator)
        kind = jsonschema.validators.extend(found, _WITH_SAFE_PATTERNS)
        error = jsonschema.exceptions.best_match(kind(content, registry=Registry()).iter_errors(json.loads(output)))
        reason = "" if error is None else str(error.message)
    except Exception as failure:  # of many types, where the schema is none or the output no JSON
        reason = f"it cannot be checked: {failure}"
    return SchemaCheck(schema.keywords, not reason, reason[:_MAX_REASON_CHARS])


def _pattern(_validator: Any, pattern: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    """Patterns that the grammar did not enforce, and within a time: backtracking can take for ever."""
    import jsonschema
    import regex

    if not (isinstance(pattern, str) and isinstance(instance, str) and is_beyond_grammars(pattern)):
        return
    if regex.search(pattern, instance, timeout=_PATTERN_TIMEOUT_S) is None:
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_WITH_SAFE_PATTERNS = {"pattern": _pattern, "patternProperties": lambda *_: None}
