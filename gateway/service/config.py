"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from easyspec.settings import ServerSettings, address_field, check_address, check_plaintext
from easyspec.speculation.parameters import TreeBudget
from easyspec.tls import ChannelTls, is_loopback
from gateway.messages.limits import RequestLimits
from gateway.peers.model_routes import NO_DRAFTER, Addresses, FurtherModel, ModelRoute, split_addresses

HTTP_OFF = "off"
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


class GatewaySettings(ServerSettings, RequestLimits):
    """Coordinates verifier and drafter, and serves clients. Flags win over EASYSPEC_GATEWAY_... variables."""

    model_config = SettingsConfigDict(env_prefix="EASYSPEC_GATEWAY_", cli_prog_name="python -m gateway")

    address: str = address_field("127.0.0.1:50051")
    http_address: str = "127.0.0.1:8000"
    """host:port of the OpenAI-compatible REST API, port 0 to 65535; 0 takes a free port, named in the `rest_listening`
    event. `off` serves gRPC alone. 8000 is where clients of such APIs look first."""
    http_hosts: str = ""
    """Names by which clients may call the REST API where it listens on this machine alone and asks for no API key,
    beside localhost and its addresses, separated by commas; * for any. A page in a browser here can have its own name
    led to this machine; a proxy in front may pass its name on."""
    cors_origins: str | None = Field(default=None, min_length=1)
    """Web pages that may call the REST API from a browser: their origins (https://host:port), separated by commas, or *
    for all. Unset: only this server's own playground."""
    http_metrics: bool = True
    """Whether that port serves /metrics too, which asks for no API key. Off: --metrics-address alone does, where
    clients shall not see how busy the service is."""
    tokenizer: Path
    """Where the base model's tokenizer is, usually its checkpoint: a folder, GGUF file or hub id. No default: it must
    fit the verifier's model."""
    verifier_address: Addresses = "127.0.0.1:50053"
    """host:port of the verifier. Several replicas: a list separated by commas, or dns:///name:port for all addresses
    behind a name. Default: the verifier's own."""
    drafter_address: Addresses | None = None
    """host:port of the drafter, or several as for the verifier. Unset: plain decoding."""
    further_models: dict[Annotated[str, Field(min_length=1)], FurtherModel] = Field(default_factory=dict)
    """Base models beside the one of --verifier-address, by the names that requests use, as JSON: {"NAME":
    {"verifier_address": "host:port"}}. tokenizer and drafter_address may be given too; unset they are those of the
    first model, so that one pool of drafters serves all (docs/multi-target.md). Default: none."""
    num_draft_levels: int = Field(default=5, ge=1, le=64)
    """Levels of a draft tree where a request names none, 1 to 64. 5 is the paper's choice."""
    tree_width: int = Field(default=4, ge=1, le=64)
    """Nodes expanded per level where a request names none, 1 to 64. 4 is the lower end of the paper's range; small
    models gain little beyond."""
    num_tree_nodes: int = Field(default=15, ge=1, le=4096)
    """Nodes of a draft tree where a request names none, 1 to 4096. 15 and the root are 16 rows, which is a size that
    passes are padded to and costs little more than a single row."""
    chat_template: Path | None = None
    """File with a chat template (Jinja, as Hugging Face has them) that stands in for the first model's own. Unset: its
    checkpoint's."""
    special_tokens_in_content: Literal["text", "allow"] = "text"
    """text or allow: what `<|im_end|>` and the like are in messages of a chat. text: no more than their characters, so
    that no user and no tool's result can end its turn and begin another's. allow: special tokens."""
    default_tool_prompt: bool = True
    """Whether tools are described to a model whose chat template knows none, in words of ours. Off: such a model's
    requests with tools are refused, unless they force a call, which a grammar makes valid."""
    closed_schemas: bool = True
    """Whether an object whose schema lists properties, and does not say whether it may have others, has only those.
    Small models invent names otherwise. Off: JSON Schema's own default, any others."""
    reasoning_parser: Literal["auto", "none"] = "auto"
    """auto or none: whether what a model thinks before its answer is told apart from it. auto looks for the marks of
    thinking (<think> and others) in its chat template. With none they are text like any other."""
    tool_call_format: Literal[
        "auto",
        "hermes",
        "llama3_json",
        "mistral",
        "mistral_args",
        "qwen3_coder",
        "pythonic",
        "harmony",
        "none",
    ] = "auto"
    """How the model writes tool calls: hermes, llama3_json, mistral, mistral_args, qwen3_coder, pythonic, harmony or
    none. auto looks at its chat template, which is what the model was trained with."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto or none: whether temperature, top_k, top_p, min_p and repetition_penalty of the checkpoint's
    generation_config.json stand in where a request leaves them unset. auto: the model was tuned for them."""
    draft_deadline_ms: int = Field(default=1000, ge=1, le=600_000)
    """Milliseconds a round waits for its draft before it goes on without, 1 to 600000; up to ten times as long where
    drafts usually take more than a twentieth of that. 1000 suits a CPU, where a draft may share its cores with the
    verifier; a GPU needs far less."""
    reopen_deadline_s: float = Field(default=30.0, gt=0.0, le=3600.0)
    """Seconds a re-opened drafting session gets to read all tokens so far, up to 3600. Nothing waits for it, so it may
    be generous."""
    verifier_open_timeout_s: float = Field(default=2.0, ge=0.0, le=3600.0)
    """Seconds a request that has no token yet is tried again where its verifier is lost, 0 to 3600. After 2 a client
    does better to try another gateway."""
    verifier_reopen_timeout_s: float = Field(default=120.0, ge=0.0, le=86_400.0)
    """Seconds a stream that has begun waits for a lost verifier, or for another replica, 0 to 86400. 120 outlasts a
    restart that loads a model of moderate size; its client only sees a pause."""
    request_timeout_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """Most seconds a request may take where the client sets no earlier deadline, up to 86400. 600 is what OpenAI's
    clients wait."""
    max_concurrent_requests: int = Field(default=64, ge=1, le=65_536)
    """Choices of one base model decoded at the same time, 1 to 65536: a request with n = 16 counts 16 times for each of
    its prompts. 64 is beyond what one pair of models serves well; a model whose verifier is lost keeps no places of
    another."""
    max_waiting_requests: int = Field(default=256, ge=0, le=65_536)
    """Prompts for one base model that may wait for a place, 0 to 65536; more are refused at once. 256 are served within
    the time they may wait if a request takes a second or two."""
    admission_timeout_s: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Seconds a request waits for a place before it is refused, up to 3600. After 10 a client does better to try
    another replica."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """refuse or ignore: what becomes of a REST request with fields that are not known or not supported. refuse names
    the field, so that no client believes in what it does not get; ignore names them in the reply's x-ignored-fields and
    counts such requests. Values that ask for nothing are always taken."""
    stalled_client_timeout_s: float = Field(default=30.0, gt=0.0, le=86_400.0)
    """Seconds that a client may leave a message of its stream unread before the request is ended and its KV memory
    freed, up to 86400. A reader that is merely slow takes one every few seconds."""
    probe_interval_s: float = Field(default=2.0, gt=0.0, le=3600.0)
    """Seconds between two looks at a service that answers, up to 3600."""
    retry_first_ms: int = Field(default=100, ge=1, le=600_000)
    """Milliseconds until a lost service is tried again, 1 to 600000; doubles with every failure."""
    retry_max_ms: int = Field(default=2000, ge=1, le=600_000)
    """Most milliseconds between two tries, 1 to 600000. 2000 finds a restarted drafter soon and costs one short RPC."""

    api_keys_file: Path | None = None
    """File with the API keys of clients, one a line, as name:key or name:sha256:<hexadecimal hash of the key>. Read
    again on SIGHUP and when it changes. Unset, with --api-keys unset too: no key is asked for."""
    api_keys: SecretStr | None = None
    """API keys in the same form, separated by commas or newlines; meant for the environment, as flags show in the
    process list."""
    max_requests_per_key: int | None = Field(default=None, ge=1, le=65_536)
    """Choices of one API key at the same time, 1 to 65536; more are refused at once. Unset: no limit of its own."""

    peer_tls_ca: Path | None = None
    """PEM file with the certificate authorities that verifier and drafter are known by; turns TLS to them on. Unset:
    plaintext, which is for this machine only."""
    peer_tls_certificate: Path | None = None
    """PEM file with the certificate chain that this gateway shows to verifier and drafter, if they ask for one (their
    --tls-client-ca)."""
    peer_tls_key: Path | None = None
    """PEM file with that certificate's private key."""
    peer_tls_server_name: str | None = Field(default=None, min_length=1)
    """Name that the certificates of verifier and drafter carry, where it is not the host they are reached by. Unset:
    the host."""

    @field_validator("http_address")
    @classmethod
    def _check_http_address(cls, address: str) -> str:
        return address if address == HTTP_OFF else check_address(address)

    @model_validator(mode="after")
    def _check_http_tls(self) -> Self:
        if self.http_address != HTTP_OFF:
            is_allowed = self.server_tls is not None or self.allow_plaintext
            check_plaintext("http_address", self.http_address, is_allowed, "tls_certificate")
        return self

    @model_validator(mode="after")
    def _check_peer_tls(self) -> Self:
        if self.peer_tls_ca is None and (self.peer_tls_certificate or self.peer_tls_key or self.peer_tls_server_name):
            raise ValueError("peer_tls_certificate, peer_tls_key and peer_tls_server_name need peer_tls_ca too")
        if (self.peer_tls_certificate is None) != (self.peer_tls_key is None):
            raise ValueError("peer_tls_certificate and peer_tls_key must be set together")
        is_allowed = self.peer_tls_ca is not None or self.allow_plaintext
        for route in self.routes:
            where = f"further_models[{route.name!r}]." if route.name else ""
            for address in route.verifier_addresses:
                check_plaintext(f"{where}verifier_address", address, is_allowed, "peer_tls_ca")
            for address in route.drafter_addresses:
                check_plaintext(f"{where}drafter_address", address, is_allowed, "peer_tls_ca")
        return self

    @property
    def asks_for_keys(self) -> bool:
        return self.api_keys_file is not None or self.api_keys is not None

    @property
    def trusted_hosts(self) -> frozenset[str] | None:
        """Names that requests without a key may call this machine by; None: any."""
        further = {name.strip().lower() for name in self.http_hosts.split(",")} - {""}
        if self.asks_for_keys or "*" in further or not is_loopback(self.http_address):
            return None
        return _LOCAL_HOSTS | further

    @property
    def peer_tls(self) -> ChannelTls | None:
        """How to reach verifier and drafter; None for plaintext."""
        if self.peer_tls_ca is None:
            return None
        return ChannelTls(self.peer_tls_ca, self.peer_tls_certificate, self.peer_tls_key, self.peer_tls_server_name)

    @property
    def routes(self) -> tuple[ModelRoute, ...]:
        """Every model that is served, the first one first."""
        drafters = split_addresses(self.drafter_address) if self.drafter_address is not None else ()
        first = ModelRoute("", self.tokenizer, split_addresses(self.verifier_address), drafters, self.chat_template)
        routes = [first]
        for name, model in self.further_models.items():  # what one does not say is as for the first
            own_drafters = drafters
            if model.drafter_address is not None:
                own_drafters = () if model.drafter_address == NO_DRAFTER else split_addresses(model.drafter_address)
            tokenizer, verifiers = model.tokenizer or self.tokenizer, split_addresses(model.verifier_address)
            routes.append(ModelRoute(name, tokenizer, verifiers, own_drafters, model.chat_template))
        return tuple(routes)

    @property
    def default_budget(self) -> TreeBudget:
        return TreeBudget(self.num_draft_levels, self.tree_width, self.num_tree_nodes)
