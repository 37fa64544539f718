"""JSON Schemas as a grammar can enforce them: what it can say otherwise is said otherwise, what it cannot is left out.

What is left out makes a schema wider, never narrower, so that a finished output can still be checked. Objects without
`additionalProperties` may be closed, and numbers, texts and lists without a bound get one, so that an output ends: both
make the language narrower, within what the schema allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easyspec.speculation.schema_closing import JoinedObjects, says_all, says_more
from easyspec.speculation.schema_references import LISTS_OF_PARTS, References, escaped, with_plain_references

# The library lets any amount of white space stand between JSON tokens, of which some models never find an end. Blanks
# on one line, or one line break with its indentation, are all that anything printed as JSON has.
JSON_WHITE_SPACE = r"[\x20\x09]{1,64}|\x0D?\x0A[\x20\x09]{0,32}"
# Formats that the grammar library enforces; any other is an annotation.
_FORMATS = frozenset({"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
# Keywords that it does not know. `format` is an annotation by the specification; these are not.
_UNENFORCED = (
    *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
    *("if", "then", "else", "not", "dependencies", "dependentRequired", "dependentSchemas", "propertyNames"),
    *("$dynamicRef", "$recursiveRef"),
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_OF_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_OF_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_OF_SCHEMAS = ("items", "additionalItems", "additionalProperties")
# All that can forbid something; beside a reference everything else is an annotation.
_CONSTRAINTS = frozenset(
    {
        *("type", "enum", "const", "format", "pattern", "minLength", "maxLength", "multipleOf", "required"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"),
        *("minProperties", "maxProperties", *_UNENFORCED, *_OF_SCHEMAS_BY_NAME, *_OF_SCHEMA_LISTS, *_OF_SCHEMAS),
    }
)
_PLACES = frozenset({"$ref", "$schema", "$id", "id", "$anchor", "$defs", "definitions"})
_VALUES = frozenset({"default", "examples", "example"})
# The library knows only these spellings.
_KNOWN_DRAFT = re.compile(
    r"http://json-schema\.org/draft-0[467]/schema#?|https://json-schema\.org/draft/(2019-09|2020-12)/schema#?"
)
_ESCAPE_OR_LOOK_AROUND = re.compile(r"\\(u[0-9a-fA-F]{4}|.)|\(\?<?[=!]", re.DOTALL)
_CLASS_OR_ESCAPE = re.compile(r"\\[pP]\{[^}]*\}|\\[xu]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
# Braces that count nothing, and anchors that are not at the ends.
_LOOSE = re.compile(r"\{(?!\d+(?:,\d*)?\})|[\^$]")
_STRANGE_ESCAPES = frozenset("123456789bBAZzGkK")
_SURROGATE = re.compile("u[dD][89a-fA-F]")
_LARGEST_NUMBER = 10**15
_NUMBER_STEP = 1e-9  # the library takes no smaller one
_MAX_CHARS = 16_384
_MAX_ITEMS = 1024
_OPTIONS = "x-guidance"
# Between the tokens of JSON: a blank, or a line break and its indentation. Small models fill whatever there may be.
_WHITE_SPACE = r"\x20|\x0D?\x0A[\x20\x09]{0,20}"


@dataclass(frozen=True)
class EnforceableSchema:
    """A schema for the grammar library, as JSON text, and the keywords that it had to leave out."""

    text: str
    unenforced: tuple[str, ...]


def enforceable(
    text: str, *, closes_objects: bool = False, bounds_values: bool = False, keeps_one_of: bool = False
) -> EnforceableSchema:
    """The schema as it can be enforced; raises ValueError if it is not JSON, or nested too deeply.

    `keeps_one_of`: the library enforces it where the alternatives exclude each other, and refuses it elsewhere.
    """
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            return EnforceableSchema(text, ())
        schema = with_plain_references(schema)
        rewriting = _Rewriting(
            JoinedObjects(schema) if closes_objects else None, bounds_values, keeps_one_of, References.of(schema)
        )
        rewritten = rewriting.schema(schema)
        if isinstance(rewritten.get("$schema"), str) and not _KNOWN_DRAFT.fullmatch(rewritten["$schema"]):
            del rewritten["$schema"]
    except RecursionError:
        raise ValueError("it is nested beyond the recursion limit") from None
    except (AttributeError, TypeError):  # any keyword may have a value of any type
        raise ValueError("a keyword has a value of another type than it must have") from None
    if bounds_values:
        rewritten[_OPTIONS] = {"whitespace_pattern": _WHITE_SPACE, **rewritten.get(_OPTIONS, {})}
    return EnforceableSchema(json.dumps(rewritten, ensure_ascii=False), tuple(rewriting.unenforced))


class _Rewriting:
    """One schema on its way; `joined` is None if no object is closed."""

    def __init__(
        self,
        joined: JoinedObjects | None,
        bounds_values: bool,
        keeps_one_of: bool,
        references: References,
    ) -> None:
        self._references = references
        self._keeps_one_of = keeps_one_of
        self._joined = joined
        self._bounds_values = bounds_values
        self.unenforced: dict[str, None] = {}  # in the order of their coming

    def schema(self, schema: Any, pointer: str = "#", shared: frozenset[str] | None = None) -> Any:
        """A schema, found at `pointer`. `shared`: the properties that others speak about as well, who say more about
        the same object; None if none does."""
        if not isinstance(schema, dict):
            return schema
        rewritten = dict(schema)
        self._drop_annotations(rewritten, schema)
        self._drop_beside_loops(rewritten, schema)
        self._drop_patterns(rewritten)
        _turn_counts(rewritten)
        self._drop_counts(rewritten, shared is not None or any(name in schema for name in (*LISTS_OF_PARTS, "$ref")))
        _turn_property_names(rewritten)
        _turn_unevaluated(rewritten)
        is_container = not any(name in _CONSTRAINTS and name not in _UNENFORCED for name in schema)
        for name in _UNENFORCED:
            if is_container and self._references.lead_into(f"{pointer}/{name}"):
                continue  # no keyword, but a name among schemas
            if name in rewritten and not _says_nothing(name, rewritten.pop(name), rewritten):
                self.unenforced[name] = None
        if _alternatives(rewritten.get("oneOf")) > 1 and not self._keeps_one_of:
            self.unenforced["oneOf"] = None
            _turn_one_of(rewritten)
        names = self._closing_names(schema, pointer, shared)
        inside = frozenset() if self._joined is None else shared or self._joined.shared(schema)
        for name in _OF_SCHEMAS_BY_NAME:
            if isinstance(rewritten.get(name), dict):
                where = f"{pointer}/{name}"
                rewritten[name] = {
                    key: self.schema(part, f"{where}/{escaped(key)}", frozenset() if key in inside else None)
                    for key, part in rewritten[name].items()
                }
        for name in _OF_SCHEMA_LISTS:
            if isinstance(rewritten.get(name), list):
                given = "oneOf" if name == "anyOf" and name not in schema else name
                is_part_open = name != "prefixItems" and (shared is not None or says_more(schema, given))
                rewritten[name] = [self.schema(part, "", inside if is_part_open else None) for part in rewritten[name]]
        for name in _OF_SCHEMAS:
            if isinstance(rewritten.get(name), list):
                rewritten[name] = [self.schema(part, "") for part in rewritten[name]]
            elif name in rewritten:
                rewritten[name] = self.schema(rewritten[name], "")
        for name, value in rewritten.items():
            is_unknown = name not in _CONSTRAINTS and name not in _PLACES and name not in _VALUES
            if (
                is_unknown
                and isinstance(value, dict)
                and self._references.lead_into(where := f"{pointer}/{escaped(name)}")
            ):
                rewritten[name] = self.schema(value, where)
        if names:
            known = rewritten.get("properties", {})
            rewritten["properties"] = known | {name: {} for name in names if name not in known}
            rewritten["additionalProperties"] = False
        if self._bounds_values:
            _bound(rewritten)
        return rewritten

    def _closing_names(self, schema: Mapping[str, Any], pointer: str, shared: frozenset[str] | None) -> list[str]:
        """The properties that an object may have if it is to have no others; none if it stays as it is."""
        if self._joined is None or shared is not None or pointer in self._joined.open_references:
            return []
        if says_all(schema):
            return list(schema["properties"])
        is_alone = self._references.lead_back(schema, schema) or ("$ref" in schema and self._references.stand_alone)
        return [] if is_alone else self._joined.names(schema)

    def _drop_annotations(self, schema: dict[str, Any], place: Mapping[str, Any]) -> None:
        if "format" in schema and schema["format"] not in _FORMATS:
            del schema["format"]
        if isinstance(schema.get("$ref"), str):
            is_lonely = self._references.stand_alone or self._references.lead_back({"$ref": schema["$ref"]}, place)
            for name in [one for one in schema if one not in _PLACES]:
                if name in _CONSTRAINTS and not self._references.stand_alone and is_lonely:
                    self.unenforced[name] = None
                if is_lonely or name not in _CONSTRAINTS:
                    del schema[name]

    def _drop_beside_loops(self, schema: dict[str, Any], place: Mapping[str, Any]) -> None:
        """Of parts of which one leads back to where they are joined that one is kept."""
        for name in LISTS_OF_PARTS:
            parts = schema.get(name)
            if not isinstance(parts, list):
                continue
            looping = [part for part in parts if self._references.lead_back(part, place)]
            if not looping:
                continue
            if name == "allOf" and len(schema[name]) > 1:
                schema[name] = looping[:1]
                self.unenforced[name] = None
            for other in [one for one in schema if one in _CONSTRAINTS - _PLACES and one != name]:
                del schema[other]
                self.unenforced[other] = None
            return

    def _drop_patterns(self, schema: dict[str, Any]) -> None:
        if isinstance(pattern := schema.get("pattern"), str) and is_beyond_grammars(pattern):
            del schema["pattern"]
            self.unenforced["pattern"] = None
        patterns = schema.get("patternProperties")
        if isinstance(patterns, dict) and any(map(is_beyond_grammars, patterns)):
            # Names that these patterns fit may be any, and have any value.
            schema["patternProperties"] = {one: part for one, part in patterns.items() if not is_beyond_grammars(one)}
            schema.pop("additionalProperties", None)
            self.unenforced["patternProperties"] = None

    def _drop_counts(self, schema: dict[str, Any], is_joined: bool) -> None:
        """The library counts properties only where no known property may be missing; others may know some."""
        known, required = schema.get("properties", {}), schema.get("required", ())
        if not isinstance(known, dict) or not isinstance(required, list | tuple):
            return
        if set(known) <= set(required) and not is_joined:
            return
        for name in ("minProperties", "maxProperties"):
            bound = schema.pop(name, None)
            if bound is not None and not (name == "minProperties" and _whole(bound) <= len(required)):
                self.unenforced[name] = None


def is_beyond_grammars(pattern: str) -> bool:
    """Whether a pattern has look-around, back references, escapes, braces or anchors that the grammar library has no
    match for."""
    if _LOOSE.search(_CLASS_OR_ESCAPE.sub("x", pattern).removeprefix("^").removesuffix("$")) is not None:
        return True
    return any(
        found.group(1) is None or found.group(1)[0] in _STRANGE_ESCAPES or _SURROGATE.match(found.group(1)) is not None
        for found in _ESCAPE_OR_LOOK_AROUND.finditer(pattern)
    )


def _says_nothing(name: str, value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a keyword that is left out would not have forbidden anything."""
    if name == "uniqueItems":
        return value is False or (isinstance(schema.get("maxItems"), int) and schema["maxItems"] <= 1)
    if name in ("then", "else"):
        return True  # told by `if`
    if name in ("unevaluatedProperties", "unevaluatedItems", "if", "propertyNames"):
        return value is True or value == {}
    return name in ("dependencies", "dependentRequired", "dependentSchemas") and value == {}


def _turn_counts(schema: dict[str, Any]) -> None:
    """1.0 is an integer to JSON Schema, which the library does not know of."""
    for name in _COUNTS:
        if isinstance(value := schema.get(name), float) and value.is_integer():
            schema[name] = int(value)


def _turn_property_names(schema: dict[str, Any]) -> None:
    """What property names must be, said by patterns or by the properties themselves, where that is the same."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict):
        return
    said = {key: value for key, value in names.items() if key not in ("type", "title", "description", "$schema")}
    if names.get("type", "string") != "string" or "patternProperties" in schema:
        return
    values = schema.get("additionalProperties", {})
    known = schema.get("properties", {})
    if not said:
        del schema["propertyNames"]
    elif set(said) == {"enum"} and all(isinstance(one, str) for one in said["enum"]):
        kept = {name: part for name, part in known.items() if name in said["enum"]}
        others = {} if values is False else dict.fromkeys(said["enum"], values)
        schema.update(properties=others | kept, additionalProperties=False)
        del schema["propertyNames"]
    elif not known and (pattern := _name_pattern(said)) is not None and not is_beyond_grammars(pattern):
        schema.update(patternProperties={pattern: values}, additionalProperties=False)
        del schema["propertyNames"]


def _name_pattern(said: Mapping[str, Any]) -> str | None:
    """One pattern for what is said of names; None if that takes several, or none says it."""
    if set(said) == {"pattern"}:
        return str(said["pattern"])
    if not set(said) <= {"minLength", "maxLength"}:
        return None
    most = said.get("maxLength", "")
    return rf"^[\s\S]{{{said.get('minLength', 0)},{most}}}$"


def _turn_one_of(schema: dict[str, Any]) -> None:
    """At least one alternative: some of them may have become wider, so that more than one fits."""
    alternatives = {"anyOf": schema.pop("oneOf")}
    if "anyOf" in schema:
        schema["allOf"] = [*schema.get("allOf", []), alternatives]
    else:
        schema |= alternatives


def _turn_unevaluated(schema: dict[str, Any]) -> None:
    """Nothing is evaluated elsewhere if nothing else speaks about the same value."""
    if any(name in schema for name in ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")):
        return
    for name, same in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if name in schema and same not in schema:
            schema[same] = schema.pop(name)


def _bound(schema: dict[str, Any]) -> None:
    """Ends for what a model could go on with for ever."""
    if "enum" in schema or "const" in schema or "$ref" in schema:
        return
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "number" in kinds or "integer" in kinds:
        _bound_number(schema, "number" in kinds)
    if "string" in kinds and not ("maxLength" in schema or "pattern" in schema or "format" in schema):
        schema["maxLength"] = max(_MAX_CHARS, _whole(schema.get("minLength")))
    has_places = any(name in schema for name in ("maxItems", "prefixItems", "additionalItems"))
    if "array" in kinds and not has_places and isinstance(schema.get("items", {}), dict):
        schema["maxItems"] = max(_MAX_ITEMS, _whole(schema.get("minItems")))


def _bound_number(schema: dict[str, Any], has_fraction: bool) -> None:
    given = [schema.get(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")]
    bounds = [value for value in given if isinstance(value, int | float) and not isinstance(value, bool)]
    if any(abs(value) >= _LARGEST_NUMBER for value in bounds) or any(isinstance(value, bool) for value in given):
        return
    if "minimum" not in schema and "exclusiveMinimum" not in schema:
        schema["minimum"] = -_LARGEST_NUMBER
    if "maximum" not in schema and "exclusiveMaximum" not in schema:
        schema["maximum"] = _LARGEST_NUMBER
    if has_fraction and "multipleOf" not in schema and all(float(value).is_integer() for value in bounds):
        schema["multipleOf"] = _NUMBER_STEP


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _alternatives(schemas: Any) -> int:
    return len(schemas) if isinstance(schemas, list) else 0
