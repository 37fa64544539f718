"""Settings that several roles share, and how settings are read: one definition for environment and flags.

Every description states unit, range and why the default is what it is; `--help` is made of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from easyspec.engine.prefill_pace import MIN_PROMPT_ROWS
from easyspec.errors import ConfigurationError
from easyspec.telemetry.logs import LogFormat, LogLevel
from easyspec.tls import ServerTls, is_loopback

MAX_PORT = 65_535
DEFAULT_SESSION_IDLE_TIMEOUT_S = 300.0

_SettingsT = TypeVar("_SettingsT", bound=BaseSettings)


def address_field(default: str) -> Any:
    """The `address` field of a role; each role has a port of its own."""
    return Field(
        default=default,
        description="host:port to listen on, port 0 to 65535. 0 takes a free port, named in the `serving` event. "
        "Loopback by default: elsewhere it needs --tls-certificate, or --allow-plaintext.",
    )


def check_address(address: str) -> str:
    """The address, if it is host:port; ValueError if not."""
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isdecimal() and int(port) <= MAX_PORT):
        raise ValueError(f"it must be host:port with port 0 to {MAX_PORT}")
    return address


def check_plaintext(name: str, address: str, is_allowed: bool, tls_field: str) -> None:
    """Raise ValueError, which says what to do, if `address` lies beyond this machine and plaintext is not allowed."""
    if not is_allowed and not is_loopback(address):
        raise ValueError(
            f"{name} is {address!r}, which is beyond this machine, and there is no TLS: set {tls_field}, or "
            "allow_plaintext if the network itself encrypts; allowed without either: 127.0.0.1, [::1], localhost"
        )


class ServerSettings(BaseSettings):
    """What every process that serves has. A role sets `address` (`address_field`), env_prefix and cli_prog_name."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    address: str
    log_format: LogFormat = "auto"
    """auto, json or console: how events are written to stderr. auto is console on a terminal, JSON elsewhere."""
    drain_grace_s: float = Field(default=30.0, ge=0.0, le=3600.0)
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C, 0 to 3600. 30 is what container platforms
    wait before they kill."""

    log_level: LogLevel = "info"
    """debug, info or warning: the least important events that are written. debug adds RPCs that services make in
    routine, every few seconds."""
    metrics_address: str | None = None
    """host:port of a small HTTP server with /metrics (Prometheus) and /health, port 0 to 65535. It asks for no key, and
    speaks TLS if the main port does. Unset: none."""
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/]+:\d+$")
    """http://host:port (or https://) of an OpenTelemetry collector that spans are sent to over gRPC; needs the extra
    `tracing`. Unset: nothing is traced, and nothing of it loaded."""
    tls_certificate: Path | None = None
    """PEM file with this server's certificate chain; turns TLS on. Read again when it is renewed."""
    tls_key: Path | None = None
    """PEM file with the certificate's private key, not encrypted."""
    tls_client_ca: Path | None = None
    """PEM file with certificate authorities: only clients with a certificate of theirs are let in (mutual TLS). Unset:
    no client certificate is asked for."""
    allow_plaintext: bool = False
    """Whether to speak without TLS beyond this machine. Off: prompts and keys would be readable on the way. On is for a
    network that encrypts by itself, or a sidecar that does."""
    reflection: bool = True
    """Whether gRPC reflection is offered, which lets tools see the methods (never data). On: it is what makes grpcurl
    work."""

    @property
    def server_tls(self) -> ServerTls | None:
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be set together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key too")
        is_allowed = self.server_tls is not None or self.allow_plaintext
        check_plaintext("address", self.address, is_allowed, "tls_certificate")
        if self.metrics_address is not None:
            check_plaintext("metrics_address", self.metrics_address, is_allowed, "tls_certificate")
        if self.otlp_endpoint is not None and self.otlp_endpoint.startswith("http://"):
            check_plaintext("otlp_endpoint", self.otlp_endpoint, self.allow_plaintext, "an https:// endpoint")
        return self

    @field_validator("address", "metrics_address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        return check_address(address) if address is not None else None


def _last_part_of_model(fields: dict[str, Any]) -> str:
    # The name as it is written: the hub's cache has links with hashes behind them.
    return Path(os.path.abspath(fields["model"])).name.removesuffix(".gguf")


class EngineSettings(ServerSettings):
    """What every role that owns a model has."""

    step_timeout_s: float = Field(default=30.0, ge=1.0, le=86_400.0)
    """Seconds after which a step that also takes 20 times the usual counts as hung, 1 to 86400; the process then says
    NOT_SERVING and ends with exit code 4, to be started again. 30 is beyond any step of a device that works; raise it
    for a debugger."""
    model: str = Field(min_length=1)
    """Checkpoint: a folder with config.json, safetensors and tokenizer, a GGUF file, or a Hugging Face hub id
    (OWNER/NAME, or OWNER/NAME/FILE.gguf). No default: it must be chosen."""
    served_model_name: str = Field(default_factory=_last_part_of_model, min_length=1)
    """Name that requests use. By default the last part of --model, the model's usual name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda: where the model runs. auto takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto, float32, bfloat16 or float16: type of weights and computation. auto is the checkpoint's own, the one the
    model was made for."""
    weights: Literal["auto", "int8", "int4"] = "auto"
    """auto, int8 or int4: format of the weight matrices. auto is the checkpoint's own; int8 and int4 round them in
    groups of 32 when they are read, which makes another, smaller model of it."""
    executor: Literal["auto", "native", "native-8bit", "reference"] = "auto"
    """auto, native, native-8bit or reference: what computes the model. native is C++ kernels on a CPU, reference is
    plain torch. auto is native on a CPU where it was built, reference elsewhere. native-8bit rounds the inputs of
    8-bit and 4-bit weights to 8 bits instead of 16, as llama.cpp does: products of several rows take 0.6 to 0.75 of the
    time, and some answers differ from those of the same weights in float32. auto does so in a drafter, where it
    changes no answer."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the model's computation, 1 to 1024. Unset is one a core, and 1 for a model whose matrices are so
    small that threads would wait for each other longer than they compute."""
    num_kv_slots: int | None = Field(default=None, ge=16, le=2**31 - 1)
    """Size of the KV pool in tokens, shared by all sessions, 16 to 2147483647. Unset is made from --kv-memory-fraction.
    A pool smaller than the model's context makes the context as short."""
    kv_memory_fraction: float | None = Field(default=None, gt=0.0, le=0.95)
    """Share of the memory that is free once the weights are loaded that the KV pool takes where --num-kv-slots is
    unset, above 0 up to 0.95. Unset is 0.2 on a CPU, whose memory others use too, with at most 32768 tokens or four
    contexts, which a CPU hardly serves at once; and 0.85 on a GPU."""
    kv_memory_gib: float | None = Field(default=None, gt=0.0, le=65_536.0)
    """GiB of the KV pool where --num-kv-slots is unset, above 0 up to 65536. Unset: made from --kv-memory-fraction."""
    share_prefixes: bool = True
    """Whether sessions whose texts begin alike share KV memory and its computation. On by default: results are the
    same, system prompts and earlier turns of a chat are read once."""
    max_prefill_slowdown: float = Field(default=1.7, ge=1.05, le=100.0)
    """How many times as long as without them a step may take for the prompts it reads while others decode, 1.05 to 100.
    1.7 keeps their pauses below twice the usual with room for noise."""
    max_model_len: int | None = Field(default=None, ge=2, le=2**31 - 1)
    """Most tokens of prompt and output together, 2 to 2147483647. Unset is the model's own limit."""
    max_tree_nodes: int = Field(default=64, ge=1, le=4096)
    """Most nodes of one draft tree, root excluded, 1 to 4096. 64 is beyond what pays on any measured pair and bounds
    what one request can cost."""
    max_batch_rows: int = Field(default=512, ge=2, le=65_536)
    """Most token rows of all sessions in one engine step, 2 to 65536; at least --prefill-chunk, and --max-tree-nodes +
    17. 512 bounds the time that one step keeps the others waiting."""
    prefill_chunk: int = Field(default=256, ge=1, le=65_536)
    """Most prompt tokens (rows) computed in one engine step, 1 to 65536; fewer while others decode, see
    --max-prefill-slowdown. 256 fills the machine and does not keep a newcomer waiting long."""

    session_idle_timeout_s: float = Field(default=DEFAULT_SESSION_IDLE_TIMEOUT_S, gt=0.0, le=86_400.0)
    """Seconds an open session may hold memory while its client says nothing, up to 86400. 300 is far beyond any round;
    a gateway whose client reads more slowly than that opens the session again."""

    @model_validator(mode="after")
    def _check_step_fits(self) -> Self:
        least = max(self.prefill_chunk, self.max_tree_nodes + 1 + MIN_PROMPT_ROWS)
        if self.max_batch_rows < least:
            raise ValueError(
                f"max_batch_rows is {self.max_batch_rows}; allowed: at least {least}, so that a prefill chunk "
                f"({self.prefill_chunk}) fits one step, and so does a tree with its root ({self.max_tree_nodes} + 1) "
                f"beside a piece of a prompt ({MIN_PROMPT_ROWS})"
            )
        return self


def load_settings(settings_type: type[_SettingsT], arguments: Sequence[str]) -> _SettingsT:
    """Settings from flags, then environment, then defaults.

    Raises ConfigurationError naming field, value and what is allowed; an unknown flag and `--help` end the process
    (SystemExit 2 and 0), as is usual.
    """
    try:
        return settings_type(_cli_parse_args=list(arguments))
    except ValidationError as error:
        # A default made from another field cannot be made if that one is wrong, which is said already.
        problems = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        raise ConfigurationError("; ".join(_explain(settings_type, problem) for problem in problems)) from None


def _explain(settings_type: type[BaseSettings], problem: Any) -> str:
    if not problem["loc"]:  # a rule over several fields: its message names them
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    description = " ".join((settings_type.model_fields[name].description or "").split())
    variable = f"{settings_type.model_config.get('env_prefix', '')}{name}".upper()
    inside = "".join(f"[{part!r}]" for part in problem["loc"][1:])  # of a field that is a structure itself
    where = f"{name}{inside} (--{name.replace('_', '-')}, {variable})"
    if problem["type"] == "missing" and not inside:
        return f"{where} is not set; allowed: {description}"
    why = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]
    return f"{where} is {problem['input']!r}: {why}; allowed: {description}"
