"""`/v1/models`: what is served here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from easyspec.speculation.messages import ModelInfo
from gateway.generation.generator import Generator
from gateway.rest.backend import InCaller

router = APIRouter()


@router.get("/v1/models")
async def list_models(caller: InCaller) -> dict[str, Any]:
    """The base models, each with the most tokens of prompt and output together, and its own sampling parameters."""
    answered = ((each, each.model_info) for each in caller.models)
    cards = [_card(generator, model, caller.started_s) for generator, model in answered if model is not None]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, caller: InCaller) -> dict[str, Any]:
    """One model; 404 model_not_found if it is not served here."""
    caller = caller.for_model(model)
    return _card(caller.generator, caller.model, caller.started_s)


def _card(generator: Generator, model: ModelInfo, started_s: int) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": started_s,
        "owned_by": "easyspec",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
        "default_sampling": generator.sampling_defaults.given,
    }
