"""Which objects of a JSON Schema may be closed: the schema must list all their properties, in one place or several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from easyspec.speculation.schema_references import LISTS_OF_PARTS, escaped, target_of

# What may say more about an object's properties than the object itself does.
COMPOSING = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "dependencies", "patternProperties")
# What says itself which properties there may be, or how many, or may need some that are listed nowhere.
_SAYS_ITSELF = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "patternProperties", "minProperties"),
    *("maxProperties", "if", "dependentSchemas", "dependencies", "enum", "const", "$dynamicRef", "$recursiveRef"),
)


def says_all(schema: Mapping[str, Any]) -> bool:
    """Whether an object lists properties, and nothing says whether it may have others."""
    says = ("additionalProperties", "unevaluatedProperties", "propertyNames", *COMPOSING)
    known, required = schema.get("properties"), schema.get("required", ())
    if not (isinstance(known, dict) and known) or any(name in schema for name in says):
        return False
    return isinstance(required, list | tuple) and all(name in known for name in required)


def says_more(schema: Mapping[str, Any], of: str) -> bool:
    """Whether an object has more to say about itself than one of its lists of alternatives or parts, or reference."""
    if of == "allOf" and isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        return True
    others = ("properties", "additionalProperties", *COMPOSING)
    return any(name in schema for name in others if name != of)


class JoinedObjects:
    """Objects of one schema that several of its parts speak about."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._counted: dict[int, Counter[str]] = {}
        # Where references lead from such a part: the definition must stay open, and properties of it that others
        # speak about as well.
        self.open_references = self._found()

    def names(self, schema: Mapping[str, Any]) -> list[str]:
        """The properties that an object and all its parts list, if it has such parts and nothing says more."""
        if not any(says_more(schema, name) for name in (*LISTS_OF_PARTS, "$ref") if name in schema):
            return []
        parts = self._parts(schema, set())
        if any(name in part for part in parts for name in _SAYS_ITSELF):
            return []
        names = dict.fromkeys(name for part in parts for name in _properties(part))
        for part in parts:
            required = part.get("required", ())
            if not isinstance(required, list | tuple) or any(name not in names for name in required):
                return []
        return list(names)

    def shared(self, schema: Mapping[str, Any]) -> frozenset[str]:
        """The properties that more than one part of an object speaks about."""
        return frozenset(name for name, count in self._counts(schema).items() if count > 1)

    def _parts(self, schema: Any, seen: set[int]) -> list[Mapping[str, Any]]:
        """All that speaks about the same object, references followed."""
        if not isinstance(schema, dict) or id(schema) in seen:
            return []
        seen.add(id(schema))
        found: list[Mapping[str, Any]] = [schema]
        for name in LISTS_OF_PARTS:
            for part in schema[name] if isinstance(schema.get(name), list) else ():
                found += self._parts(part, seen)
        if isinstance(reference := schema.get("$ref"), str):
            target = target_of(self._schema, reference) if reference.startswith("#") else None
            # What is elsewhere may say anything.
            found += self._parts(target, seen) if isinstance(target, dict) else [{"additionalProperties": True}]
        return found

    def _counts(self, schema: Any) -> Counter[str]:
        """How many parts that hold together speak about each property."""
        if not isinstance(schema, dict):
            return Counter()
        if id(schema) in self._counted:
            return self._counted[id(schema)]
        self._counted[id(schema)] = Counter()  # for what leads back here
        counts = Counter(_properties(schema))
        for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
            counts += self._counts(part)
        for name in ("anyOf", "oneOf"):
            most: Counter[str] = Counter()
            for part in schema[name] if isinstance(schema.get(name), list) else ():
                most |= self._counts(part)
            counts += most
        if isinstance(reference := schema.get("$ref"), str):
            counts += self._counts(target_of(self._schema, reference))
        self._counted[id(schema)] = counts
        return counts

    def _found(self) -> frozenset[str]:
        found: set[str] = set()
        waiting: list[tuple[Any, frozenset[str] | None]] = [(self._schema, None)]
        while waiting:
            part, shared = waiting.pop()
            if isinstance(part, list):
                waiting += [(one, shared) for one in part]
            if not isinstance(part, dict):
                continue
            reference = part.get("$ref")
            inner = shared
            if inner is None and any(says_more(part, name) for name in (*LISTS_OF_PARTS, "$ref") if name in part):
                inner = self.shared(part)
            is_joined = shared is not None or (isinstance(reference, str) and says_more(part, "$ref"))
            if is_joined and isinstance(reference, str) and reference not in found:
                found |= {reference, *(f"{reference}/properties/{escaped(name)}" for name in inner or ())}
                waiting.append((target_of(self._schema, reference), inner))
            for name, value in part.items():
                is_list = name in LISTS_OF_PARTS and isinstance(value, list)
                is_part = is_list and (shared is not None or says_more(part, name))
                waiting.append((value, inner if is_part else None))
        return frozenset(found)


def _properties(schema: Mapping[str, Any]) -> list[str]:
    return list(schema["properties"]) if isinstance(schema.get("properties"), dict) else []
