"""Settings of the verifier."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from easyspec.settings import EngineSettings, address_field


class VerifierSettings(EngineSettings):
    """Serves the base model, which decides every token. Flags win over EASYSPEC_VERIFIER_... variables."""

    model_config = SettingsConfigDict(env_prefix="EASYSPEC_VERIFIER_", cli_prog_name="python -m verifier_service")

    address: str = address_field("127.0.0.1:50053")
    max_waiting_sessions: int = Field(
        default=64,
        ge=0,
        le=65_536,
        description="Sessions that may wait for KV memory, first come first served, 0 to 65536; more are refused at "
        "once. 64 is what a gateway decodes at a time by default.",
    )
    admission_timeout_s: float = Field(
        default=10.0,
        gt=0.0,
        le=3600.0,
        description="Seconds a session waits for KV memory before it is refused, above 0 up to 3600. "
        "After 10 a client does better to try another replica.",
    )
