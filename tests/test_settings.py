"""One definition for environment and flags; bad values name field, value and what is allowed."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from drafter_service.config import DrafterSettings
from easyspec.errors import ConfigurationError
from easyspec.settings import EngineSettings, load_settings
from verifier_service.config import VerifierSettings

ROLES = [VerifierSettings, DrafterSettings]


def test_defaults() -> None:
    verifier = load_settings(VerifierSettings, ["--model", "models/base/"])
    drafter = load_settings(DrafterSettings, ["--model", "org/draft-model"])
    assert (verifier.address, drafter.address) == ("127.0.0.1:50053", "127.0.0.1:50052")
    assert (verifier.served_model_name, drafter.served_model_name) == ("base", "draft-model")
    assert (verifier.num_kv_slots, verifier.max_tree_nodes, verifier.prefill_chunk) == (None, 64, 256)
    assert (drafter.layer_parallel_size, drafter.layer_groups, drafter.mlp) == (None, None, "staged")


def test_flags_win_over_the_environment_which_wins_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYSPEC_DRAFTER_MODEL", "from-environment")
    monkeypatch.setenv("EASYSPEC_DRAFTER_NUM_THREADS", "3")
    monkeypatch.setenv("EASYSPEC_DRAFTER_MLP", "sequential")
    monkeypatch.setenv("EASYSPEC_VERIFIER_NUM_THREADS", "7")
    settings = load_settings(DrafterSettings, ["--model", "from-flag", "--layer-groups", "0 | 1-3 | 4"])
    assert (settings.model, settings.num_threads, settings.mlp) == ("from-flag", 3, "sequential")
    assert settings.layer_groups == "0 | 1-3 | 4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["model (--model, EASYSPEC_DRAFTER_MODEL) is not set"]),
        (["--model", "x", "--num-threads", "0"], ["num_threads", "--num-threads", "is '0'", "1 to 1024"]),
        (["--model", "x", "--num-kv-slots", "many"], ["num_kv_slots", "is 'many'", "16 to 2147483647"]),
        (["--model", "x", "--mlp", "parallel"], ["mlp", "is 'parallel'", "sequential or staged"]),
        (["--model", "x", "--device", "tpu"], ["device", "is 'tpu'", "auto, cpu or cuda"]),
        (["--model", "x", "--drain-grace-s", "nan"], ["drain_grace_s", "is 'nan'", "0 to 3600"]),
        (["--model", "x", "--address", "localhost"], ["address", "is 'localhost'", "host:port"]),
        (["--model", "x", "--address", "localhost:70000"], ["address", "is 'localhost:70000'", "65535"]),
        (["--model", "x", "--max-batch-rows", "100"], ["max_batch_rows is 100", "at least 256"]),
        (
            ["--model", "x", "--prefill-chunk", "16", "--max-batch-rows", "80"],
            ["max_batch_rows is 80", "at least 81"],
        ),
    ],
)
def test_bad_values_name_field_value_and_range(arguments: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigurationError) as failure:
        load_settings(DrafterSettings, arguments)
    for part in expected:
        assert part in str(failure.value)
    assert "default factory" not in str(failure.value)
    assert "\n" not in str(failure.value)


def test_bad_environment_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYSPEC_VERIFIER_PREFILL_CHUNK", "-1")
    with pytest.raises(ConfigurationError, match=r"EASYSPEC_VERIFIER_PREFILL_CHUNK\) is '-1'"):
        load_settings(VerifierSettings, ["--model", "x"])


def test_an_unknown_flag_ends_the_process_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_settings(VerifierSettings, ["--model", "x", "--speed", "11"])
    assert ended.value.code == 2
    assert "--speed" in capsys.readouterr().err


@pytest.mark.parametrize("settings_type", ROLES)
def test_help_shows_every_field_in_kebab_case(
    settings_type: type[EngineSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        load_settings(settings_type, ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, field in settings_type.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description, f"{name} has no description"


@pytest.mark.parametrize("settings_type", ROLES)
def test_descriptions_state_the_limits_that_are_enforced(settings_type: type[EngineSettings]) -> None:
    for name, schema in settings_type.model_json_schema()["properties"].items():
        for option in schema.get("anyOf", [schema]):
            for limit in (option.get("minimum"), option.get("maximum")):
                assert limit is None or f"{limit:g}" in schema["description"] or f"{limit}" in schema["description"], (
                    name
                )


def test_settings_are_frozen() -> None:
    settings = VerifierSettings(model="x")
    with pytest.raises(ValidationError, match="frozen"):
        settings.model = "y"
