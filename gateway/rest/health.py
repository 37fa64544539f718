"""`/health` and `/version`: no API key is asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from easyspec import __version__
from easyspec.errors import UnavailableError
from gateway.generation.generator import Generator
from gateway.rest.backend import InCaller

router = APIRouter()


@router.get("/health")
async def health(caller: InCaller) -> dict[str, Any]:
    """200 while requests are taken, 503 while loading or draining; and how the services behind are.

    With several models they are told one by one, and `status` is `degraded` while some of them cannot be used.
    """
    reply: dict[str, Any] = {"status": "ok", **_services(caller.generator)}
    generators = list(caller.models)
    if len(generators) > 1:
        if not all(generator.verifier_peer.is_ready for generator in generators):
            reply["status"] = "degraded"
        reply["models"] = {generator.name or "": _services(generator) for generator in generators}
    return reply


@router.get("/health/{model:path}")
async def model_health(model: str, caller: InCaller) -> dict[str, Any]:
    """200 while a verifier of this model can be used, 503 while none can, 404 model_not_found."""
    services = _services(caller.for_model(model).generator)
    if services["verifier"] != "ready":
        raise UnavailableError(f"the verifier is {services['verifier']}")
    return {"status": "ok", **services}


@router.get("/version")
async def version() -> dict[str, str]:
    """The package version."""
    return {"version": __version__}


def _services(generator: Generator) -> dict[str, str]:
    drafter = generator.drafter_peer
    return {
        "verifier": generator.verifier_peer.state.value,
        "drafter": drafter.state.value if drafter is not None else "none",
    }
