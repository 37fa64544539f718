"""What the gateway knows at the moment of a scrape: its models, the replicas behind it, and how much it speculates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.peers.peer import PeerState

if TYPE_CHECKING:
    from easyspec.speculation.messages import KvUsage
    from gateway.speculation.controller import ControllerState

_MODEL = ("model_name",)


@dataclass(frozen=True)
class PeerSample:
    """One replica behind the gateway, as it is now."""

    role: str
    address: str
    state: PeerState
    num_sessions: int


@dataclass(frozen=True)
class ModelSample:
    """One base model as it is now. `kv` is its verifiers' memory at their last probes; `speculation` is what
    requests in mode auto follow."""

    name: str
    is_ready: bool
    num_running: int
    num_waiting: int
    kv: tuple[KvUsage | None, ...]
    speculation: ControllerState

    @property
    def kv_share(self) -> float | None:
        """The used part of the memory, 0 to 1; None if no verifier has told."""
        known = [kv for kv in self.kv if kv is not None]
        return sum(kv.num_used_slots for kv in known) / sum(kv.num_slots for kv in known) if known else None


@dataclass(frozen=True)
class GatewayState:
    """What the gateway knows at one moment."""

    models: tuple[ModelSample, ...]
    peers: tuple[PeerSample, ...]


class StateCollector(Collector):
    """Reads the state at every scrape."""

    def __init__(self, read_state: Callable[[], GatewayState | None]) -> None:
        self._read_state = read_state

    def collect(self) -> Iterator[Metric]:
        state = self._read_state()
        if state is None:
            return
        models = state.models
        running = {model.name: model.num_running for model in models}
        yield _by_model("vllm:num_requests_running", "Requests being decoded.", running)
        waiting = {model.name: model.num_waiting for model in models}
        yield _by_model("vllm:num_requests_waiting", "Requests waiting for a place.", waiting)
        used = {model.name: share for model in models if (share := model.kv_share) is not None}
        if used:
            yield _by_model("vllm:kv_cache_usage_perc", "Used part of the verifiers' KV, 0 to 1.", used)
        ready = {model.name: float(model.is_ready) for model in models}
        yield _by_model("easyspec_model_ready", "1 while a verifier of the model can be used.", ready)
        yield from _speculation({model.name: model.speculation for model in models})
        states = GaugeMetricFamily(
            "easyspec_peer_state", "1 for the state that a replica is in.", labels=("role", "address", "state")
        )
        sessions = GaugeMetricFamily(
            "easyspec_peer_sessions", "Sessions of this gateway at a replica.", labels=("role", "address")
        )
        for peer in state.peers:
            sessions.add_metric((peer.role, peer.address), peer.num_sessions)
            for possible in PeerState:
                states.add_metric((peer.role, peer.address, possible.value), float(possible is peer.state))
        yield states
        yield sessions

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _speculation(states: Mapping[str, ControllerState]) -> Iterator[Metric]:
    followed = GaugeMetricFamily(
        "easyspec_speculation_arm", "1 for the size of tree that requests in mode auto follow.", labels=(*_MODEL, "arm")
    )
    throughput = GaugeMetricFamily(
        "easyspec_speculation_arm_tokens_per_second",
        "What each size of tree was measured to bring at the present load.",
        labels=(*_MODEL, "arm"),
    )
    for model, state in states.items():
        for arm in state.arms:
            followed.add_metric((model, arm), float(arm == state.arm))
        for arm, tokens_per_s in state.tokens_per_s.items():
            throughput.add_metric((model, arm), tokens_per_s)
    yield followed
    yield throughput
    switches = CounterMetricFamily(
        "easyspec_speculation_switches", "Changes of the followed size, trials included.", labels=_MODEL
    )
    trials = CounterMetricFamily(
        "easyspec_speculation_trials", "Moments in which another size was tried.", labels=_MODEL
    )
    trial_cost = CounterMetricFamily(
        "easyspec_speculation_trial_cost_seconds", "Time that trials have cost.", labels=_MODEL
    )
    for model, state in states.items():
        switches.add_metric((model,), state.num_switches)
        trials.add_metric((model,), state.num_trials)
        trial_cost.add_metric((model,), state.trial_cost_s)
    yield from (switches, trials, trial_cost)


def _by_model(name: str, text: str, values: Mapping[str, float]) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=_MODEL)
    for model, value in values.items():
        metric.add_metric((model,), value)
    return metric
