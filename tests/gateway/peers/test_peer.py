from __future__ import annotations

import asyncio

import pytest

from easyspec.speculation.messages import ModelInfo
from gateway.peers.peer import ExponentialBackoff, JitteredBackoff, Peer, PeerInfo, PeerPolicy, PeerState
from tests.fakes.verifier_pool import BACKOFF

MODEL = ModelInfo("toy", 352, 2048, "fa4e", 1000, "float32", (0,), 8)


async def test_a_session_lost_while_a_probe_is_under_way_is_not_forgotten() -> None:
    answering = asyncio.Event()
    answering.set()

    async def fetch_info() -> PeerInfo:
        await answering.wait()
        return PeerInfo(MODEL, 64)

    peer = Peer("drafter", fetch_info, "fa4e", PeerPolicy(1.0, ExponentialBackoff(1.0, 1.0)))
    await peer.probe()
    assert peer.is_ready
    answering.clear()
    probing = asyncio.create_task(peer.probe())
    await asyncio.sleep(0)
    peer.report_failure("late")
    answering.set()
    await probing
    assert not peer.is_ready
    await peer.probe()
    assert peer.is_ready


def test_jitter_only_shortens() -> None:
    pauses = [JitteredBackoff(ExponentialBackoff(0.1, 1.0))(3) for _ in range(200)]
    assert 0.2 <= min(pauses) < 0.25
    assert 0.35 < max(pauses) <= 0.4


@pytest.mark.parametrize(("num_tolerated", "expected"), [(0, 1), (3, 4)])
async def test_a_misfit_behind_a_name_is_tolerated_for_a_while(num_tolerated: int, expected: int) -> None:
    fingerprint = "t0"

    async def fetch() -> PeerInfo:
        model = ModelInfo("base", 100, 512, fingerprint, 1, "float32", (0,), 2)
        return PeerInfo(model, 64)

    peer = Peer("verifier", fetch, "t0", PeerPolicy(1.0, BACKOFF, num_tolerated))
    await peer.probe()
    assert peer.is_ready
    fingerprint = "other"
    num_probes = 0
    while peer.is_ready:
        await peer.probe()
        num_probes += 1
    assert num_probes == expected
    assert peer.state is PeerState.REFUSED
