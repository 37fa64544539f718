"""`/tokenize` and `/detokenize`, in vLLM's shape."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from easyspec.errors import InvalidRequestError
from easyspec.speculation.checks import check_token_ids
from gateway.rest.backend import InCaller
from gateway.rest.chat_request import MAX_MESSAGES, ConversationFields, Message
from gateway.rest.fields import Boolean, ListOf, RestModel, Text, TokenId
from gateway.rest.json_route import JsonRoute

router = APIRouter(route_class=JsonRoute)


class TokenizeRequest(ConversationFields):
    """Body of `/tokenize`: a prompt, or messages with what belongs to them."""

    messages: ListOf[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)  # type: ignore[assignment]
    model: Text | None = Field(None, description="Name of the model; unset: the first one served.")
    prompt: Text | None = Field(None, description="Text, tokenized as `/v1/completions` does.")
    return_token_strs: Boolean | None = Field(None, description="Also the text of each token.")


class DetokenizeRequest(RestModel):
    """Body of `/detokenize`."""

    model: Text | None = Field(None, description="Name of the model; unset: the first one served.")
    tokens: ListOf[TokenId] = Field(description="Token ids.")


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, caller: InCaller) -> dict[str, Any]:
    """Token ids of a text or of a conversation, as a completion would see them."""
    caller = caller.for_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", body.prompt, "exactly one of prompt and messages")
    tokenizer = caller.generator.tokenizer
    token_ids = await caller.encoded(body.prompt if body.prompt is not None else body.conversation())
    reply = {"count": len(token_ids), "max_model_len": caller.model.max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        reply["token_strs"] = [tokenizer.token_text(token_id) for token_id in token_ids]
    return reply


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, caller: InCaller) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    caller = caller.for_model(body.model)
    check_token_ids("tokens", body.tokens, caller.model.vocab_size)
    return {"prompt": await asyncio.to_thread(caller.generator.tokenizer.decode, body.tokens)}
