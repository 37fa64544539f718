"""Whether environment variables are settings of a role, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from unittest import mock

from drafter_service.config import DrafterSettings
from easyspec.settings import ServerSettings
from gateway.service.config import GatewaySettings
from verifier_service.config import VerifierSettings

SETTINGS: Mapping[str, type[ServerSettings]] = MappingProxyType(
    {"verifier": VerifierSettings, "drafter": DrafterSettings, "gateway": GatewaySettings}
)
SERVICE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "verifier": "easyspec.v1.VerifierService",
        "drafter": "easyspec.v1.DrafterService",
        "gateway": "easyspec.v1.GenerationService",
    }
)
# Time to cancel and flush after the drain grace (`easyspec.rpc.lifecycle`).
AFTER_DRAIN_S = 6.0


def settings_of(role: str, environment: Mapping[str, str]) -> ServerSettings:
    """The settings that a container of this environment has; fails for a variable that is not a setting of the role."""
    settings_type = SETTINGS[role]
    prefix = str(settings_type.model_config.get("env_prefix"))
    for name in environment:
        if name.startswith("EASYSPEC_"):
            assert name.startswith(prefix), f"{name} is not for the {role}"
            field = name.removeprefix(prefix).lower()
            assert field in settings_type.model_fields, f"{name} is not a setting of the {role}"
    with mock.patch.dict("os.environ", environment, clear=True):
        return settings_type()  # type: ignore[call-arg]
