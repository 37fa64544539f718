"""`/health` and `/version`: open to everyone."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from easyspec import __version__
from gateway.rest.backend import InCaller

router = APIRouter()


@router.get("/health")
async def health(caller: InCaller) -> dict[str, Any]:
    """200 while requests are taken, 503 while loading or draining; and how the services behind are."""
    drafter = caller.generator.drafter_peer
    return {
        "status": "ok",
        "verifier": caller.generator.verifier_peer.state.value,
        "drafter": drafter.state.value if drafter is not None else "none",
    }


@router.get("/version")
async def version() -> dict[str, str]:
    """The package version."""
    return {"version": __version__}
