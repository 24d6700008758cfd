"""/v1/chat/completions, /v1/completions, /v1/models, /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .service import EVENTS, Service
from .writing import TokenNames, Writer

_EITHER: dict[int | str, dict[str, Any]] = {200: {**EVENTS, "description": "JSON, or a stream of events."}}


def openai_routes(service: Service) -> APIRouter:
    """Return the routes of OpenAI's interface."""
    router = APIRouter()
    names = TokenNames(service.tokenizer)

    @router.post("/v1/chat/completions", responses=_EITHER)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(service, names, body, request, is_chat=True)

    @router.post("/v1/completions", responses=_EITHER)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue plain prompts."""
        return await _answer(service, names, body, request, is_chat=False)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the served names of the model."""
        return {"object": "list", "data": [_card(service, name) for name in service.names]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """Describe the model under one of its names."""
        service.check_model(name)
        return _card(service, name)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Return the ids of a text, or of messages with the prompt's format."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("Send either prompt, a text, or messages.", param="prompt")
        if body.messages is not None:
            ids = await service.prompts.of_messages(body.messages)
        else:
            ids = await service.prompts.of_text(body.prompt, body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.prompts.longest}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Return the text of ids."""
        try:
            return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}
        except ValueError as error:
            raise ApiError(str(error), param="tokens") from error

    return router


async def _answer(
    service: Service, names: TokenNames, body: ChatRequest | CompletionRequest, request: Request, is_chat: bool
) -> Response:
    body.check()
    service.check_model(body.model)
    prompts = [body.messages] if is_chat else body.prompts
    if not prompts:
        raise ApiError("The list of prompts is empty; send a text.", param="prompt")
    leave = service.door.enter(len(prompts) * (body.n or 1))
    try:
        ids = [await _ids(service, prompt, is_chat) for prompt in prompts]
        asked = [one for prompt in ids for one in service.prompts.asked(body, prompt, is_chat)]
        generation = service.generate(request, asked)
    except BaseException:
        leave()
        raise
    kind = "chat.completion" if is_chat else "text_completion"
    writer = Writer(kind, body.model or service.names[0], names, sum(map(len, ids)), body.reported)
    if body.stream:
        return service.stream(request, generation, leave, writer.events(generation, body.stream_options))
    return await service.whole(request, generation, leave, writer.whole)


async def _ids(service: Service, prompt: Any, is_chat: bool) -> tuple[int, ...]:
    if is_chat:
        return await service.prompts.of_messages(prompt)
    return await service.prompts.of_text(prompt) if isinstance(prompt, str) else service.prompts.of_ids(prompt)


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "faster_chatglm_6b",
        "max_model_len": service.prompts.longest,
    }
