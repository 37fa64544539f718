from __future__ import annotations

import json
import time

import pytest

from gateway.text.schema_check import UnenforcedSchema, checked


@pytest.mark.parametrize(
    ("schema", "output", "is_valid"),
    [
        ({"uniqueItems": True}, "[1, 2]", True),
        ({"uniqueItems": True}, "[1, 1]", False),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "dependencies": {"a": ["b"]}}, '{"a": 1}', False),
        ({"$schema": "https://example.org/own", "uniqueItems": True}, "[1, 2]", True),
        ({"not": {"required": ["a"]}}, '{"b": 1}', True),
        ({"uniqueItems": True}, "[1, ", False),
        ({"not": {"$ref": "http://localhost:1/x"}}, "1", False),
        ({"items": {"pattern": "^(?!a)"}}, '["b", "c"]', True),
        ({"items": {"pattern": "^(?!a)"}}, '["b", "a"]', False),
        ({"uniqueItems": 7, "type": "no type"}, "[]", False),
    ],
)
def test_an_output_is_checked_by_the_whole_schema(schema: object, output: str, is_valid: bool) -> None:
    check = checked(output, UnenforcedSchema(json.dumps(schema), ("x",)))
    assert check.is_valid is is_valid
    assert bool(check.reason) != is_valid


def test_a_pattern_costs_no_time() -> None:
    """It is the grammar's; matched by backtracking this one takes hours."""
    schema = {"items": {"pattern": "^(a+)+$"}, "patternProperties": {"^(a+)+$": {}}, "uniqueItems": True}
    beyond = {"items": {"pattern": "^(?=a)(a+)+$"}}
    started_s = time.monotonic()
    assert checked(json.dumps(["a" * 40 + "!"]), UnenforcedSchema(json.dumps(beyond), ("pattern",))).is_valid is False
    for value in (["a" * 40 + "!"], {"a" * 40 + "!": 1}):
        assert checked(json.dumps(value), UnenforcedSchema(json.dumps(schema), ("uniqueItems",))).is_valid
    assert time.monotonic() - started_s < 2
