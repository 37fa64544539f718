"""Fields of requests that nothing here knows: which ask for nothing, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

# What other servers and clients document as the defaults of fields that mean nothing here; null, false, 0 and what is
# empty ask for nothing in any field.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "best_of": (1,),
    "cache_prompt": (True,),
    "chat_template_kwargs": ({"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}),
    "detokenize": (True,),
    "do_sample": (True,),
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
    "truncate_prompt_tokens": (-1,),
    "truncation": ("auto", "disabled"),
    "typical_p": (1,),
    "usage": ({"include": True}, {"include": False}),
    "verbosity": ("medium",),
}


# Names of the fields that are ignored of the request that is being read; None where they must be refused.
_ignored: ContextVar[dict[str, None] | None] = ContextVar("ignored_fields", default=None)


def note_ignored(names: dict[str, None] | None) -> None:
    """Before a request is read, in its own task: what is ignored of it is put down in `names`; None: nothing is."""
    _ignored.set(names)


def ignores_unknown() -> bool:
    """Whether the request that is being read may have fields that are not known."""
    return _ignored.get() is not None


def ignored(name: str) -> bool:
    """Put down that a field is ignored; False where it must be refused."""
    names = _ignored.get()
    if names is not None:
        names[name] = None
    return names is not None


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
