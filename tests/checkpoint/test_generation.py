from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from easyspec.checkpoint.generation import NO_DEFAULTS, SamplingDefaults, end_token_ids, sampling_defaults
from easyspec.errors import ConfigurationError


def write(folder: Path, **fields: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_what_a_checkpoint_asks_for(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == NO_DEFAULTS
    write(tmp_path, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, do_sample=True, eos_token_id=2)
    assert sampling_defaults(tmp_path) == SamplingDefaults(0.7, 20, 0.8, None, 1.05)
    assert sampling_defaults(tmp_path).given == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
    }
    assert sampling_defaults(write(tmp_path, top_k=0, min_p=0.1, temperature=None)).given == {"min_p": 0.1}


@pytest.mark.parametrize(
    "fields", [{"temperature": "hot"}, {"top_p": 0}, {"top_k": 2.5}, {"temperature": -1}, {"top_p": True}]
)
def test_values_that_no_request_may_have(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"generation_config\.json asks for .*--generation-config none"):
        sampling_defaults(write(tmp_path, **fields))


@pytest.mark.parametrize("eos", ["<end>", [1, "2"], 1.5, True])
def test_end_tokens_are_ids(tmp_path: Path, eos: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"eos_token_id is .* in generation_config\.json"):
        end_token_ids(write(tmp_path, eos_token_id=eos), None)
