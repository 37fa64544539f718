"""How the command gets into a gateway that asks for a key, or speaks TLS: by environment variables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from easyspec.tls import ChannelTls


@dataclass(frozen=True)
class GatewayAccess:
    """What a gateway is shown, and what it is known by; by default nothing, in plaintext."""

    api_key: str | None = field(default=None, repr=False)
    tls: ChannelTls | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


ANONYMOUS = GatewayAccess()


class _Variables(BaseSettings):
    """EASYSPEC_API_KEY, EASYSPEC_TLS_CA (turns TLS on), EASYSPEC_TLS_CERTIFICATE, ..._KEY, ..._SERVER_NAME."""

    model_config = SettingsConfigDict(env_prefix="EASYSPEC_", frozen=True)

    api_key: SecretStr | None = None
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None


def access_from_environment(is_own_gateway: bool) -> GatewayAccess:
    """As the variables say; a gateway that the command has started itself speaks plaintext on this machine."""
    variables = _Variables()
    tls = None
    if variables.tls_ca is not None and not is_own_gateway:
        tls = ChannelTls(variables.tls_ca, variables.tls_certificate, variables.tls_key, variables.tls_server_name)
    return GatewayAccess(variables.api_key.get_secret_value() if variables.api_key else None, tls)
