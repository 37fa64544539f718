"""Settings of the verifier."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict

from easyspec.rpc.settings import EngineSettings, address_field


class VerifierSettings(EngineSettings):
    """Serves the base model, which decides every token. Flags win over EASYSPEC_VERIFIER_... variables."""

    model_config = SettingsConfigDict(env_prefix="EASYSPEC_VERIFIER_", cli_prog_name="python -m verifier_service")

    address: str = address_field("127.0.0.1:50053")
