"""From settings to served models: connections, verifiers and drafters, and a generator for each model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from easyspec.checkpoint.generation import NO_DEFAULTS, sampling_defaults
from easyspec.checkpoint.location import TOKENIZER_PATTERNS, model_path
from easyspec.errors import ConfigurationError, UnavailableError
from easyspec.rpc.channels import open_channel
from easyspec.tokenizer_fingerprint import tokens_by_id
from easyspec.vocabulary import vocabulary_difference
from gateway.doorway.admission import Admission
from gateway.doorway.api_keys import ClientLimiter
from gateway.generation.generator import Generator
from gateway.generation.served_models import ServedModels
from gateway.peers.clients import DrafterClient, VerifierClient
from gateway.peers.draft_session import DraftConnection, DrafterPool, DraftLimits
from gateway.peers.model_routes import ModelRoute
from gateway.peers.peer import ExponentialBackoff, JitteredBackoff, Peer, PeerPolicy
from gateway.peers.replica_set import Replica, ReplicaSet
from gateway.peers.verify_session import FailoverLimits, VerifierPool, VerifyConnection
from gateway.service.config import GatewaySettings
from gateway.telemetry.observation import GenerationObserver
from gateway.text.tokenizer import ChatOptions, Tokenizer
from gateway.text.tools import ToolDialect, dialect_of

# A peer that is loading does not answer at all; one that answers does so in milliseconds.
_INFO_TIMEOUT_S = 2.0
# Probes meet the replicas behind a name in turn: that many misfits in a row mean that all or most of them are.
_TOLERATED_MISFITS_OF_A_NAME = 3


# What the settings call a checkpoint, and the file that stands in for its chat template.
TokenizerKey: TypeAlias = tuple[Path, Path | None]


def load_tokenizers(settings: GatewaySettings) -> dict[TokenizerKey, Tokenizer]:
    """The tokenizers of all models as the settings name them, each read once; takes seconds.

    Hub ids are fetched. Raises ConfigurationError.
    """
    keys = dict.fromkeys((route.tokenizer, route.chat_template) for route in settings.routes)
    return {
        (name, template): Tokenizer.load(model_path(str(name), TOKENIZER_PATTERNS), _chat_options(settings, template))
        for name, template in keys
    }


def _chat_options(settings: GatewaySettings, template: Path | None) -> ChatOptions:
    try:
        source = template.read_text(encoding="utf-8") if template is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"chat_template is {template}; it cannot be read: {error}") from None
    is_text = settings.special_tokens_in_content == "text"
    return ChatOptions(source, is_text, settings.default_tool_prompt, settings.reasoning_parser == "auto")


class Assembly:
    """Builds the models of a gateway, and owns their connections; made and used in the running event loop."""

    def __init__(
        self, settings: GatewaySettings, observers: Sequence[GenerationObserver], clients: ClientLimiter
    ) -> None:
        self._settings = settings
        self._observers = observers
        self._clients = clients
        self._backoff = ExponentialBackoff(settings.retry_first_ms / 1000, settings.retry_max_ms / 1000)
        self._channels: list[Any] = []
        # Models with the same drafters and the same tokenizer share one pool, and what is known about it.
        self._pools: dict[tuple[tuple[str, ...], str], DrafterPool] = {}

    def build(self, tokenizers: Mapping[TokenizerKey, Tokenizer]) -> ServedModels:
        """All models of the settings; no service has been asked yet. Raises ConfigurationError."""
        routes = self._settings.routes
        return ServedModels([self._generator(one, tokenizers[one.tokenizer, one.chat_template]) for one in routes])

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _generator(self, route: ModelRoute, tokenizer: Tokenizer) -> Generator:
        settings = self._settings
        failover = FailoverLimits(
            settings.verifier_open_timeout_s, settings.verifier_reopen_timeout_s, JitteredBackoff(self._backoff)
        )
        return Generator(
            tokenizer,
            VerifierPool(self._verifiers(route, tokenizer), failover),
            self._drafter_pool(route, tokenizer),
            Admission(settings.max_concurrent_requests, settings.max_waiting_requests, settings.admission_timeout_s),
            settings.default_budget,
            settings.stalled_client_timeout_s,
            limits=settings,
            clients=self._clients,
            observers=self._observers,
            tool_dialect=_tool_dialect(settings, tokenizer),
            served_name=route.name,
            sampling_defaults=NO_DEFAULTS
            if settings.generation_config == "none"
            else sampling_defaults(tokenizer.path),
            closes_schemas=settings.closed_schemas,
        )

    def _drafter_pool(self, route: ModelRoute, tokenizer: Tokenizer) -> DrafterPool | None:
        if not route.drafter_addresses:
            return None
        key = route.drafter_addresses, tokenizer.fingerprint
        if key not in self._pools:
            deadlines = self._settings.draft_deadline_ms / 1000, self._settings.reopen_deadline_s
            self._pools[key] = DrafterPool(self._drafters(route, tokenizer), DraftLimits(*deadlines, self._backoff))
        return self._pools[key]

    def _verifiers(self, route: ModelRoute, tokenizer: Tokenizer) -> ReplicaSet[VerifyConnection]:
        replicas: list[Replica[VerifyConnection]] = []
        for address in route.verifier_addresses:
            client = VerifierClient(self._channel(address, VerifierClient.service_name), _INFO_TIMEOUT_S)
            replicas.append(Replica(address, self._peer("verifier", address, client, tokenizer), client))
        return ReplicaSet("verifier", replicas)

    def _drafters(self, route: ModelRoute, tokenizer: Tokenizer) -> ReplicaSet[DraftConnection]:
        replicas: list[Replica[DraftConnection]] = []
        for address in route.drafter_addresses:
            channel = self._channel(address, DrafterClient.service_name)
            client = DrafterClient(channel, _INFO_TIMEOUT_S, self._settings.request_timeout_s)
            replicas.append(Replica(address, self._peer("drafter", address, client, tokenizer), client))
        return ReplicaSet("drafter", replicas)

    def _peer(self, role: str, address: str, client: VerifierClient | DrafterClient, tokenizer: Tokenizer) -> Peer:
        is_name_of_many = "://" in address or address.startswith(("dns:", "ipv4:", "ipv6:"))
        misfits = _TOLERATED_MISFITS_OF_A_NAME if is_name_of_many else 0
        policy = PeerPolicy(self._settings.probe_interval_s, self._backoff, misfits)
        explain = partial(_difference, role, client, tokenizer.path)
        return Peer(f"{role} {address}", client.info, tokenizer.fingerprint, policy, explain)

    def _channel(self, address: str, service_name: str) -> Any:
        channel = open_channel(address, service_name, tls=self._settings.peer_tls)
        self._channels.append(channel)
        return channel


async def _difference(role: str, client: VerifierClient | DrafterClient, path: Path) -> str:
    """Where the vocabulary of a service differs from that of the tokenizer in `path`; raises EasyspecError."""
    theirs = await client.vocabulary()
    if not theirs:
        raise UnavailableError(f"the {role} does not report its vocabulary")
    ours = await asyncio.to_thread(tokens_by_id, path)
    difference = vocabulary_difference(ours, theirs) or "all tokens are shared, and merges differ"
    return f"in {path} and at the {role} {difference}"


def _tool_dialect(settings: GatewaySettings, tokenizer: Tokenizer) -> ToolDialect:
    if settings.tool_call_format != "auto":
        return ToolDialect(settings.tool_call_format)
    template = tokenizer.templates.find(has_tools=True)
    if template is not None and template.knows_tools:
        return dialect_of(template.source)
    # Described by ourselves, and that is how.
    return ToolDialect.HERMES if template is not None and settings.default_tool_prompt else ToolDialect.NONE
