"""`/v1/models`: what is served here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from easyspec.errors import UnknownModelError
from gateway.rest.backend import Caller, InCaller

router = APIRouter()


@router.get("/v1/models")
async def list_models(caller: InCaller) -> dict[str, Any]:
    """The base model, with the most tokens of prompt and output together."""
    return {"object": "list", "data": [_card(caller)]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, caller: InCaller) -> dict[str, Any]:
    """One model; 404 model_not_found if it is not served here."""
    if model != caller.model.name:
        raise UnknownModelError(model, caller.model.name)
    return _card(caller)


def _card(caller: Caller) -> dict[str, Any]:
    return {
        "id": caller.model.name,
        "object": "model",
        "created": caller.started_s,
        "owned_by": "easyspec",
        "root": caller.model.name,
        "parent": None,
        "max_model_len": caller.model.max_model_len,
    }
