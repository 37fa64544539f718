"""What a grammar cannot say is said otherwise or left out, and then named; the rest stays as it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.parameters import Grammar, GrammarKind
from easyspec.speculation.schemas import enforceable
from tests.fakes.tiny_tokenizer import write_tokenizer

TEXT: dict[str, Any] = {"type": "string"}
AB = {"type": "object", "properties": {"a": TEXT, "b": TEXT}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[GrammarCompiler]:
    with closing(GrammarCompiler(folder, 352, (0,))) as compiler:
        yield compiler


def accepts(compiler: GrammarCompiler, folder: Path, schema: Any, value: Any, **options: bool) -> bool:
    text = enforceable(json.dumps(schema), **options).text
    state = GrammarState(asyncio.run(compiler.compile(Grammar(GrammarKind.JSON_SCHEMA, text))), ignore_eos=False)
    written = value if isinstance(value, str) else json.dumps(value)
    token_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(written).ids
    return all(map(state.advance, token_ids)) and bool(state.allowed_bits()[0] & 1)


@pytest.mark.parametrize(
    ("schema", "good", "bad", "unenforced"),
    [
        ({"type": "string", "format": "binary"}, '"x"', 1, ()),
        ({"type": "object", "properties": {"format": {"type": "string", "format": "x-y"}}}, {"format": "a"}, [], ()),
        ({"type": "array", "items": TEXT, "uniqueItems": True}, ["a", "b"], [1], ("uniqueItems",)),
        ({"type": "array", "items": TEXT, "uniqueItems": True, "maxItems": 1}, ["a"], ["a", "b"], ()),
        ({"type": "array", "items": TEXT, "uniqueItems": False}, ["a", "a"], [1], ()),
        ({"type": "object", "propertyNames": TEXT, "additionalProperties": TEXT}, {"a": "b"}, {"a": 1}, ()),
        (
            {"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}, "additionalProperties": {"type": "integer"}},
            {"ab": 1},
            {"d": 1},
            (),
        ),
        ({"type": "object", "propertyNames": {"maxLength": 2}}, {"ab": 1}, {"abc": 1}, ()),
        (
            {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": TEXT, "required": ["b"]},
            {"b": "x"},
            {"b": "x", "c": "x"},
            (),
        ),
        ({"type": "object", "propertyNames": {"not": TEXT}}, {"b": 1}, [], ("propertyNames",)),
        (AB | {"unevaluatedProperties": False}, {"a": "x"}, {"c": "x"}, ()),
        ({"allOf": [AB], "unevaluatedProperties": False}, {"a": "x"}, {"a": 1}, ("unevaluatedProperties",)),
        (AB | {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"a": "x"}, {"a": 1}, ("if",)),
        ({"type": "string", "pattern": "^(?!a)[a-z]+$"}, '"b"', 1, ("pattern",)),
        ({"type": "string", "pattern": r"^\\b[a-c]$"}, '"\\\\ba"', '"b"', ()),
        (AB | {"not": {"required": ["a"]}}, {"a": "x"}, {"a": 1}, ("not",)),
        (AB | {"dependencies": {"a": ["b"]}}, {"a": "x"}, {"a": 1}, ("dependencies",)),
        (AB | {"dependentRequired": {"a": ["b"]}, "dependentSchemas": {}}, {"a": "x"}, [], ("dependentRequired",)),
        ({"oneOf": [AB, {"type": "object", "properties": {"c": TEXT}}]}, {"a": "x"}, [], ("oneOf",)),
        ({"oneOf": [AB]}, {"a": "x"}, [], ()),
        ({"type": "array", "minItems": 1.0, "maxItems": 2.0}, [1], [], ()),
        ({"$schema": "https://json-schema.org/draft-07/schema", "type": "integer"}, "1", '"1"', ()),
        (AB | {"required": ["a", "c"]}, {"a": "x", "c": 1}, {"a": "x"}, ()),
        (AB | {"minProperties": 2}, {"a": "x"}, [], ("minProperties",)),
        (AB | {"minProperties": 1, "required": ["a"]}, {"a": "x"}, {"b": "x"}, ()),
        (AB | {"maxProperties": 2, "required": ["a", "b"]}, {"a": "x", "b": "x"}, {"a": "x"}, ()),
        (
            {"type": "object", "patternProperties": {"^(?!x)": TEXT}, "additionalProperties": False},
            {"a": 1},
            [],
            ("patternProperties",),
        ),
        ({"type": "object", "propertyNames": {"pattern": "^(?!x)"}}, {"a": 1}, [], ("propertyNames",)),
        ({"type": "string", "pattern": r"^\${.*}$"}, '"b"', 1, ("pattern",)),
        ({"type": "string", "pattern": "^(?:^a|b)$"}, '"b"', 1, ("pattern",)),
        ({"type": "string", "pattern": r"^[{^$]{2}\{$"}, '"^{{"', '"a"', ()),
        ({"$ref": "#/$defs/a", "title": "x", "x-y": 1, "$defs": {"a": {"enum": [1]}}}, "1", "2", ()),
        ({"type": "object", "properties": {"a": {"$ref": "#", "type": "object"}}}, {"a": {}}, {"a": 1}, ("type",)),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "type": "object",
                "properties": {"a": {"$ref": "#", "type": "array"}},
            },
            {"a": {}},
            {"a": {"a": []}},
            (),
        ),
        (
            {"$ref": "#/definitions/3/parts", "definitions": {"3": {"parts": {"type": "array", "uniqueItems": True}}}},
            [1],
            {},
            ("uniqueItems",),
        ),
        ({"$ref": "#/definitions/m/if", "definitions": {"m": {"if": {"enum": [1]}, "x": TEXT}}}, "1", "2", ()),
        ({"allOf": [AB, {"minProperties": 1}]}, {"a": "x"}, {"a": 1}, ("minProperties",)),
        ({"allOf": [AB, {"minProperties": 0}]}, {"a": "x"}, {"a": 1}, ()),
        ({"maxProperties": 2, "anyOf": [AB, {"type": "null"}]}, {"a": "x"}, {"a": 1}, ("maxProperties",)),
        ({"type": "array", "contains": TEXT, "minContains": 2}, [1], {}, ("contains", "minContains")),
        ({"type": "object", "properties": {"not": TEXT, "if": TEXT, "oneOf": TEXT}}, {"not": "x"}, {"not": 1}, ()),
    ],
)
def test_what_can_be_enforced_is_and_the_rest_is_named(
    compiler: GrammarCompiler, folder: Path, schema: Any, good: Any, bad: Any, unenforced: tuple[str, ...]
) -> None:
    assert enforceable(json.dumps(schema)).unenforced == unenforced
    for options in ({}, {"closes_objects": True, "bounds_values": True}):
        assert accepts(compiler, folder, schema, good, **options)
        assert not accepts(compiler, folder, schema, bad, **options)


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        (AB, True),
        (AB | {"additionalProperties": True}, False),
        (AB | {"patternProperties": {"^x": TEXT}}, False),
        ({"type": "object"}, False),
        ({"$ref": "#/$defs/ab", "$defs": {"ab": AB}}, True),
        ({"allOf": [{"$ref": "#/$defs/ab"}], "$defs": {"ab": AB}}, True),
        ({"anyOf": [AB, {"type": "null"}]}, True),
        ({"oneOf": [AB, {"type": "null"}], "discriminator": {"propertyName": "a"}}, True),
        (AB | {"oneOf": [{"properties": {"c": TEXT}}, {"type": "null"}]}, False),
        ({"allOf": [AB, {"properties": {"c": TEXT}}]}, False),
        ({"allOf": [{"$ref": "#/$defs/ab"}, {"properties": {"c": TEXT}}], "$defs": {"ab": AB}}, False),
        (AB | {"anyOf": [{"properties": {"c": TEXT}}]}, False),
    ],
)
def test_objects_are_closed_where_nothing_else_is_said_about_them(
    compiler: GrammarCompiler, folder: Path, schema: Any, is_closed: bool
) -> None:
    wider = {"a": "x", "c": "y"}
    assert accepts(compiler, folder, schema, {"a": "x"}, closes_objects=True)
    assert accepts(compiler, folder, schema, wider)
    assert accepts(compiler, folder, schema, wider, closes_objects=True) != is_closed


C: dict[str, Any] = {"type": "object", "properties": {"c": TEXT}}
NODE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
DEFS = {"$defs": {"ab": AB | {"required": ["a"]}, "node": NODE}}


def nested(name: str) -> dict[str, Any]:
    return {"properties": {"a": {"type": "object", "properties": {name: TEXT}, "required": [name]}}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"allOf": [AB, C]}, {"a": "x", "c": "y"}, {"a": "x", "d": 1}),
        ({"allOf": [{"$ref": "#/$defs/ab"}, C], **DEFS}, {"a": "x", "c": "y"}, {"a": "x", "d": 1}),
        ({"$ref": "#/$defs/ab", "properties": {"c": TEXT}, **DEFS}, {"a": "x", "c": "y"}, {"a": "x", "d": 1}),
        (AB | {"anyOf": [C | {"required": ["c"]}, {"required": ["a"]}]}, {"b": "x", "c": "y"}, {"a": "x", "d": 1}),
        (AB | {"oneOf": [C, {"type": "null"}]}, {"a": "x", "c": "y"}, {"a": "x", "d": 1}),
        (C | {"allOf": [{"allOf": [AB]}, {"type": "object"}]}, {"c": "x", "b": "y"}, {"c": "x", "d": 1}),
        ({"allOf": [{"$ref": "#/$defs/node"}, AB], **DEFS}, {"kids": [{"kids": []}], "a": "x"}, {"d": 1}),
        ({"allOf": [nested("p"), nested("q")]}, {"a": {"p": "x", "q": "y"}}, {"b": 1}),
        ({"type": "object", "properties": {"a": {"allOf": [AB, C]}}}, {"a": {"a": "x", "c": "y"}}, {"a": {"d": 1}}),
    ],
)
def test_objects_that_several_parts_speak_about_are_closed(
    compiler: GrammarCompiler, folder: Path, schema: Any, good: Any, bad: Any
) -> None:
    assert accepts(compiler, folder, schema, good, closes_objects=True)
    assert accepts(compiler, folder, schema, bad)
    assert not accepts(compiler, folder, schema, bad, closes_objects=True)


@pytest.mark.parametrize(
    "part",
    [
        {"additionalProperties": True},
        {"minProperties": 1},
        {"patternProperties": {"^x": TEXT}},
        {"required": ["d"]},
        {"if": {"required": ["d"]}},
        {"enum": [{"a": "x", "d": 1}]},
    ],
)
def test_objects_stay_open_where_a_part_says_more(
    compiler: GrammarCompiler, folder: Path, part: dict[str, Any]
) -> None:
    assert accepts(compiler, folder, {"allOf": [AB, part]}, {"a": "x", "d": 1}, closes_objects=True)


@pytest.mark.parametrize(
    ("schema", "good", "bad", "unenforced"),
    [
        (
            {"$dynamicAnchor": "n", "properties": {"a": {"items": {"$dynamicRef": "#n"}, "type": "array"}}},
            {"a": [{"a": []}]},
            {"a": [{"a": 1}]},
            (),
        ),
        (
            {"$recursiveAnchor": True, "properties": {"a": {"items": {"$recursiveRef": "#"}, "type": "array"}}},
            {"a": [{"a": []}]},
            {"a": [{"a": 1}]},
            (),
        ),
        ({"properties": {"a": {"$ref": "#n"}}, "$defs": {"n": {"$anchor": "n", **TEXT}}}, {"a": "x"}, {"a": 1}, ()),
        (
            {"$id": "https://x.y/z", "properties": {"a": {"$ref": "https://x.y/z#/$defs/n"}}, "$defs": {"n": TEXT}},
            {"a": "x"},
            {"a": 1},
            (),
        ),
        (
            {
                "properties": {"a": {"$ref": "n#m"}, "b": {"$dynamicRef": "#m"}},
                "$defs": {"n": {"$id": "n", "$dynamicAnchor": "m", **TEXT}},
            },
            {"a": "x", "b": 1},
            {"a": 1},
            ("$dynamicRef",),
        ),
        (
            {
                "properties": {"a": {"$dynamicRef": "#m"}},
                "$defs": {"n": {"$dynamicAnchor": "m", **TEXT}, "k": {"$dynamicAnchor": "m"}},
            },
            {"a": 1},
            [1],
            ("$dynamicRef",),
        ),
        ({"enum": [{"$dynamicAnchor": "n", "$ref": "#n"}]}, {"$dynamicAnchor": "n", "$ref": "#n"}, {}, ()),
        (
            {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#"}, {"required": ["b"]}]}}},
            {"a": {"a": {}}},
            {"a": 1},
            ("allOf",),
        ),
        (
            {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, TEXT], "not": {}, "minLength": 1}}},
            {"a": {"a": "x"}},
            {"a": 1},
            ("not", "minLength"),
        ),
    ],
)
def test_references_are_followed_where_they_lead_to_one_place(
    compiler: GrammarCompiler, folder: Path, schema: Any, good: Any, bad: Any, unenforced: tuple[str, ...]
) -> None:
    assert set(enforceable(json.dumps({"type": "object"} | schema)).unenforced) == set(unenforced)
    for options in ({}, {"closes_objects": True, "bounds_values": True}):
        assert accepts(compiler, folder, {"type": "object"} | schema, good, **options)
        assert not accepts(compiler, folder, {"type": "object"} | schema, bad, **options)


@pytest.mark.parametrize(
    ("schema", "good", "endless"),
    [
        ({"type": "number"}, ["-0.5", "12", "3.141592653", "0"], ["0." + "3" * 30, "1" * 30]),
        ({"type": "integer"}, ["-12", "0"], ["1" * 30]),
        ({"type": "number", "minimum": 0}, ["0.25"], ["0." + "3" * 30, "1" * 30]),
        ({"type": ["number", "null"]}, ["null", "1.5"], ["0." + "3" * 30]),
        ({"type": "integer", "exclusiveMinimum": 5}, ["6"], ["1" * 30]),
        ({"type": "array", "items": {"type": "integer"}}, ["[\n    1,\n    2\n]"], ["[  1]", "[\n" + " " * 30 + "1]"]),
        ({"type": "array", "items": {"type": "integer"}}, ["[1, 2]"], ["[" + ",".join("1" * 2000) + "]"]),
    ],
)
def test_values_without_a_bound_get_one(
    compiler: GrammarCompiler, folder: Path, schema: Any, good: list[str], endless: list[str]
) -> None:
    for text in good:
        assert accepts(compiler, folder, schema, text, bounds_values=True), text
    for text in endless:
        assert accepts(compiler, folder, schema, text), text
        assert not accepts(compiler, folder, schema, text, bounds_values=True), text


@pytest.mark.parametrize(
    "bounds", [{"maximum": 10**17}, {"maximum": 10**15, "minimum": -(10**15)}, {"multipleOf": 0.5}]
)
def test_bounds_that_are_there_stay(bounds: dict[str, Any]) -> None:
    for kind in ("number", "integer"):
        rewritten = json.loads(enforceable(json.dumps({"type": kind, **bounds}), bounds_values=True).text)
        assert bounds.items() <= rewritten.items()


keywords = st.recursive(
    st.sampled_from([{"type": "string"}, {"type": "integer", "minimum": 3}, {"enum": ["a", 1]}, True, {"format": "x"}]),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "uniqueItems": st.booleans()}),
        st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("ab"), inner)}),
        st.fixed_dictionaries({"not": inner, "anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"oneOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"propertyNames": inner, "type": st.just("object")}),
        st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=2)}),
    ),
    max_leaves=5,
)
values = st.recursive(
    st.sampled_from([None, 1, 5, "a", "b"]),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=4,
)


@given(schema=keywords, value=values)
def test_a_schema_becomes_wider_and_only_where_it_says_so(schema: Any, value: Any) -> None:
    rewritten = enforceable(json.dumps(schema))
    wider = json.loads(rewritten.text)
    was_valid = jsonschema.Draft202012Validator(schema).is_valid(value)
    is_valid = jsonschema.Draft202012Validator(wider).is_valid(value)
    assert is_valid or not was_valid
    if not rewritten.unenforced:
        assert is_valid == was_valid


@given(schema=keywords, value=values)
def test_closing_makes_a_schema_narrower(schema: Any, value: Any) -> None:
    closed = json.loads(enforceable(json.dumps(schema), closes_objects=True).text)
    if jsonschema.Draft202012Validator(closed).is_valid(value):
        wider = json.loads(enforceable(json.dumps(schema)).text)
        assert jsonschema.Draft202012Validator(wider).is_valid(value)


@given(
    name=st.sampled_from(
        ["properties", "required", "allOf", "anyOf", "$ref", "$defs", "propertyNames", "enum", "type"]
    ),
    value=st.sampled_from([None, 1, "x", [], [[]], [{}], {}, {"a": []}, [None], True]),
    beside=st.sampled_from([{}, {"allOf": [AB, C]}, AB, {"propertyNames": {"enum": ["a"]}}, {"minProperties": 2}]),
)
def test_keywords_of_any_type_are_taken_or_refused(name: str, value: Any, beside: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        enforceable(json.dumps(beside | {name: value}), closes_objects=True, bounds_values=True)


@pytest.mark.parametrize("text", ["{", "", "[" * 5000 + "]" * 5000])
def test_what_is_no_schema(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        enforceable(text)


def test_other_values_are_left_to_the_library() -> None:
    for text in ("true", "false", "3", "[]"):
        assert enforceable(text).text == text
