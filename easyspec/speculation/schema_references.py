"""What a JSON Schema refers to within itself, and its references as pointers from its root."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

_DRAFT = re.compile(r"https?://json-schema\.org/(?:draft-0([4-7])/schema|draft/(?:2019-09|2020-12)/schema)#?")
# Their values are data, not schemas.
_DATA = ("enum", "const", "default", "examples", "example")
LISTS_OF_PARTS = ("allOf", "anyOf", "oneOf")
_ANCHORS = ("$anchor", "$dynamicAnchor")


@dataclass(frozen=True)
class References:
    """What a schema refers to within itself. `inside`: of targets that lead back to themselves, the ids of all objects
    that they are made of. `stand_alone`: its draft ignores whatever stands beside a reference."""

    targets: frozenset[str]
    inside: Mapping[str, frozenset[int]]
    stand_alone: bool

    @classmethod
    def of(cls, schema: Mapping[str, Any]) -> References:
        draft = _DRAFT.fullmatch(schema["$schema"]) if isinstance(schema.get("$schema"), str) else None
        targets = frozenset(_targets(schema))
        places = {target: target_of(schema, target) for target in targets}
        steps = {target: targets & {*_targets(place)} for target, place in places.items()}
        own = {target: frozenset(id(part) for _, part in _parts(place, "")) for target, place in places.items()}
        inside: dict[str, frozenset[int]] = {}
        for target in targets:
            behind = _behind(target, steps)
            if target in behind:
                inside[target] = frozenset().union(*(own[one] for one in behind))
        return cls(targets, inside, draft is not None and draft.group(1) is not None)

    def lead_back(self, part: Any, place: Mapping[str, Any]) -> bool:
        """Whether a part of an object leads to something that has the object in it: the grammar library cannot join
        such a part with others."""
        return any(id(place) in self.inside.get(reference, ()) for reference in _references_of(part))

    def lead_into(self, pointer: str) -> bool:
        return any(target == pointer or target.startswith(f"{pointer}/") for target in self.targets)


def target_of(schema: Any, pointer: str) -> Any:
    """What a reference leads to; None if nothing is there."""
    place = schema
    for part in pointer.removeprefix("#").split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        else:
            place = place.get(name) if isinstance(place, dict) else None
    return place


def escaped(key: str) -> str:
    """A name as a JSON pointer has it."""
    return re.sub("[~/]", lambda found: "~0" if found.group() == "~" else "~1", key)


def with_plain_references(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its references by anchor, by its own identifier, dynamic or recursive, as pointers.

    A dynamic reference means the anchor of its name unless several schemas have one, or parts of the schema have
    identifiers: then it is left as it is, and anchors are plain ones.
    """
    parts = list(_parts(schema, "#"))
    anchors: dict[str, list[str]] = {}
    for pointer, part in parts:
        for name in {part[key] for key in _ANCHORS if isinstance(part.get(key), str)}:
            anchors.setdefault(f"#{name}", []).append(pointer)
    has_parts = any(isinstance(part.get("$id"), str) for pointer, part in parts if pointer != "#")
    own = schema["$id"].removesuffix("#") if isinstance(schema.get("$id"), str) else ""
    places = {} if has_parts else {name: found[0] for name, found in anchors.items() if len(found) == 1}
    recursive = {} if has_parts else {"#": "#"}

    def plain(value: Any, is_data: bool = False) -> Any:
        if isinstance(value, list):
            return [plain(one, is_data) for one in value]
        if not isinstance(value, dict):
            return value
        made = {name: plain(one, is_data or name in _DATA) for name, one in value.items()}
        if is_data:
            return made
        if isinstance(reference := made.get("$ref"), str):
            if own and not has_parts and reference.startswith(f"{own}#"):
                reference = reference.removeprefix(own)
            made["$ref"] = places.get(reference, reference)
        for name, targets in (("$dynamicRef", places | recursive), ("$recursiveRef", recursive)):
            if "$ref" not in made and isinstance(made.get(name), str) and made[name] in targets:
                made["$ref"] = targets[made.pop(name)]
        if isinstance(made.get("$recursiveAnchor"), bool):
            del made["$recursiveAnchor"]
        if isinstance(made.get("$dynamicAnchor"), str):
            made.setdefault("$anchor", made.pop("$dynamicAnchor"))
        return made

    rewritten: dict[str, Any] = plain(schema)
    return rewritten


def _parts(value: Any, pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects of a schema that are no data, each with where it is."""
    if isinstance(value, dict):
        yield pointer, value
        for name, part in value.items():
            if name not in _DATA:
                yield from _parts(part, f"{pointer}/{escaped(name)}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _parts(part, f"{pointer}/{index}")


def _references_of(part: Any) -> Iterator[str]:
    """The references that say something about the same value as the part does."""
    if not isinstance(part, dict):
        return
    if isinstance(part.get("$ref"), str):
        yield part["$ref"]
    for name in LISTS_OF_PARTS:
        for one in part[name] if isinstance(part.get(name), list) else ():
            yield from _references_of(one)


def _behind(target: str, steps: Mapping[str, set[str] | frozenset[str]]) -> set[str]:
    """All targets that one leads to."""
    found: set[str] = set()
    waiting = [*steps[target]]
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += steps[one]
    return found


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _targets(part)
