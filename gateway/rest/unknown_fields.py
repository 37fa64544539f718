"""Fields of requests that nothing here knows: which ask for nothing, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

# What other servers and clients document as the defaults of fields that mean nothing here; null, false, 0 and what is
# empty ask for nothing in any field.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "add_generation_prompt": (True,),
        "add_special_tokens": (True,),
        "best_of": (1,),
        "cache_prompt": (True,),
        "chat_template_kwargs": ({"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}),
        "detokenize": (True,),
        "do_sample": (True,),
        "early_stopping": (False,),
        "format": ({"type": "text"},),
        "function_call": ("none", "auto"),
        "guided_decoding_backend": ("auto",),
        "id_slot": (-1,),
        "include_reasoning": (True,),
        "length_penalty": (1,),
        "logit_bias_type": ("tokens",),
        "modalities": (["text"],),
        "n_predict": (-1,),
        "num_beams": (1,),
        "num_return_sequences": (1,),
        "parallel_tool_calls": (True,),
        "penalty_last_n": (64,),
        "reasoning": ({"effort": "none"}, {"enabled": False}),
        "repeat_last_n": (64,),
        "repeat_penalty": (1,),
        "route": ("fallback",),
        "safety_settings": ("default",),
        "separate_reasoning": (True,),
        "spaces_between_special_tokens": (True,),
        "stream_reasoning": (True,),
        "tfs_z": (1,),
        "thinking": ({"type": "disabled"},),
        "tool_choice": ("none", "auto"),
        "truncate": (None,),
        "truncate_prompt_tokens": (-1,),
        "truncation": ("auto", "disabled"),
        "typical_p": (1,),
        "usage": ({"include": True}, {"include": False}),
        "verbosity": ("medium",),
    }
)


class IgnoredFields:
    """Names of fields that a request had and nothing here knows. `are_ignored`: they do not count, but are told."""

    def __init__(self, are_ignored: bool) -> None:
        self.are_ignored = are_ignored
        self.names: dict[str, None] = {}  # in the order of their coming


_ignored: ContextVar[IgnoredFields | None] = ContextVar("ignored_fields", default=None)


@contextmanager
def noting(fields: IgnoredFields) -> Iterator[None]:
    """Around the reading of one request: what is ignored of it is put down in `fields`."""
    token = _ignored.set(fields)
    try:
        yield
    finally:
        _ignored.reset(token)


def ignores_unknown() -> bool:
    """Whether the request that is being read may have fields that are not known."""
    fields = _ignored.get()
    return fields is not None and fields.are_ignored


def ignored(name: str) -> bool:
    """Put down that a field is ignored; False where it must be refused."""
    fields = _ignored.get()
    if fields is None or not fields.are_ignored:
        return False
    fields.names[name] = None
    return True


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field that has no meaning here has a value that changes nothing where it has one."""
    if value is None or value is False or value in ("", [], {}):
        return True
    if isinstance(value, dict):
        # An object whose fields are unset or have documented defaults. 0 and false count: `{"temperature": 0}`.
        holds_nothing = all(
            inner is None or (isinstance(inner, dict | list | str) and asks_for_nothing(inner_name, inner))
            for inner_name, inner in value.items()
        )
        return holds_nothing or any(value == default for default in _DEFAULTS.get(name, ()))
    if isinstance(value, bool):
        return any(value is default for default in _DEFAULTS.get(name, ()))
    return value == 0 or any(value == default and default is not True for default in _DEFAULTS.get(name, ()))


def without_unknown(known: frozenset[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an object that are `known`, and those for which it must be refused."""
    return {
        name: value
        for name, value in values.items()
        if name in known or not (asks_for_nothing(name, value) or ignored(name))
    }
