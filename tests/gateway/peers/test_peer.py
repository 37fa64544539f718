from __future__ import annotations

import asyncio

from easyspec.speculation.messages import ModelInfo
from gateway.peers.peer import ExponentialBackoff, Peer, PeerInfo, PeerPolicy

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
