"""What the gateway knows at the moment of a scrape: its models, the replicas behind it, and how much it speculates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.peers.peer import PeerState

if TYPE_CHECKING:
    from gateway.generation.served_models import ServedModels
    from gateway.speculation.controller import ControllerState

_MODEL = ("model_name",)


class StateCollector(Collector):
    """Reads the state of the models at every scrape; nothing while None are there yet, or no verifier has answered."""

    def __init__(self, read_models: Callable[[], ServedModels | None]) -> None:
        self._read_models = read_models

    def collect(self) -> Iterator[Metric]:
        served = self._read_models()
        if served is None or not served.infos:
            return
        models = {generator.name: generator for generator in served if generator.name}
        running = {name: generator.num_running for name, generator in models.items()}
        yield _by_model("vllm:num_requests_running", "Requests being decoded.", running)
        waiting = {name: generator.num_waiting for name, generator in models.items()}
        yield _by_model("vllm:num_requests_waiting", "Requests waiting for a place.", waiting)
        used: dict[str, float] = {}
        for name, generator in models.items():
            infos = [replica.peer.info for replica in generator.verifier_peer.replicas]
            told = [info.kv for info in infos if info is not None and info.kv is not None]
            if told:
                used[name] = sum(kv.num_used_slots for kv in told) / sum(kv.num_slots for kv in told)
        if used:
            yield _by_model("vllm:kv_cache_usage_perc", "Used part of the verifiers' KV, 0 to 1.", used)
        ready = {name: float(generator.verifier_peer.is_ready) for name, generator in models.items()}
        yield _by_model("easyspec_model_ready", "1 while a verifier of the model can be used.", ready)
        yield from _speculation({name: generator.speculation.state() for name, generator in models.items()})
        states = GaugeMetricFamily(
            "easyspec_peer_state", "1 for the state that a replica is in.", labels=("role", "address", "state")
        )
        sessions = GaugeMetricFamily(
            "easyspec_peer_sessions", "Sessions of this gateway at a replica.", labels=("role", "address")
        )
        for role, replica in ((role, replica) for role, replicas in served.peers for replica in replicas.replicas):
            sessions.add_metric((role, replica.address), replica.num_sessions)
            for possible in PeerState:
                states.add_metric((role, replica.address, possible.value), float(possible is replica.peer.state))
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
    counts: tuple[tuple[str, str, Callable[[ControllerState], float]], ...] = (
        ("switches", "Changes of the followed size, trials included.", lambda state: state.num_switches),
        ("trials", "Moments in which another size was tried.", lambda state: state.num_trials),
        ("trial_cost_seconds", "Time that trials have cost.", lambda state: state.trial_cost_s),
    )
    for name, text, count in counts:
        family = CounterMetricFamily(f"easyspec_speculation_{name}", text, labels=_MODEL)
        for model, state in states.items():
            family.add_metric((model,), count(state))
        yield family


def _by_model(name: str, text: str, values: Mapping[str, float]) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=_MODEL)
    for model, value in values.items():
        metric.add_metric((model,), value)
    return metric
