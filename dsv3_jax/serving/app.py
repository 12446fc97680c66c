"""The routes."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import mimetypes
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

import dsv3_jax
from dsv3_jax.serving.answering import Answering, Shape, timed_out
from dsv3_jax.serving.api_errors import PHRASES, ApiError, bad_request
from dsv3_jax.serving.body import parse_json
from dsv3_jax.serving.gate import Gate
from dsv3_jax.serving.guides import guide_for
from dsv3_jax.serving.metrics import CONTENT_TYPE
from dsv3_jax.serving.schemas import (
    REQUESTS,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    Strict,
    validate,
)
from dsv3_jax.serving.service import Ask, ChatAsk, Service
from dsv3_jax.serving.shapes import ChatShape, CompletionShape, GenerateShape, TokenNames

Prepared = tuple[Sequence[Ask], Shape]
Prepare = Callable[[], Awaitable[Prepared]]
LOG = logging.getLogger("dsv3_jax.serving")
STATIC = Path(__file__).parent / "static"
OPENAI_DEFAULTS = {"temperature": 1.0}
"""What differs from the engine's own defaults, which /generate has."""
GENERATE_TOKENS, COMPLETION_TOKENS = 200, 16
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build(service: Service) -> Gate:
    """The application of one server."""
    app = FastAPI(
        title="dsv3_jax", version=dsv3_jax.__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    _errors(app)
    _probes(app, service)
    _generating(app, service)
    _page(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return Gate(app, service.settings, service.metrics, service.unavailable)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = ApiError(error.status_code, PHRASES.get(error.status_code, "the request failed")).body()
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        LOG.error("request %s failed", request.scope["request_id"])  # the server logs the traceback
        return JSONResponse(ApiError(500, PHRASES[500], code="internal_error").body(), 500)


def _probes(app: FastAPI, service: Service) -> None:
    def status(good: bool, **more: Any) -> Response:
        return JSONResponse({"status": "ok" if good else "unavailable", **more}, 200 if good else 503)

    @app.get("/livez", tags=["probes"], responses={503: {"description": "The process must be replaced."}})
    async def livez() -> Response:
        """Whether the process can still serve, now or after it has loaded its model."""
        return status(not service.dead)

    @app.get("/readyz", tags=["probes"], responses={503: {"description": "Loading, draining or dead."}})
    async def readyz() -> Response:
        """Whether requests are taken now."""
        why = service.unavailable()
        return status(why is None and not service.dead, **({} if why is None else {"reason": why.code}))

    @app.get("/health", tags=["probes"], responses={503: {"description": "Loading, draining or dead."}})
    async def health() -> Response:
        """As /readyz."""
        return await readyz()

    @app.get(
        "/metrics", tags=["probes"], responses={200: {"content": {"text/plain": {}}}}, response_class=Response
    )
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", tags=["openai"])
    async def models() -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [_card(service)]})

    @app.get("/v1/models/{model:path}", tags=["openai"], responses={404: {"description": "No such model."}})
    async def model(model: str) -> Response:
        """The model, by its exact id."""
        service.check_model(model)
        return JSONResponse(_card(service))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_id,
        "object": "model",
        "created": service.model.created,
        "owned_by": "dsv3_jax",
        "max_model_len": service.context,
    }


def _generating(app: FastAPI, service: Service) -> None:
    names = TokenNames(service.model.tokenizer)

    async def answer(
        request: Request, options: Any, choices: int, prepare: Prepare, seed: int | None, **defaults: Any
    ) -> Response:
        """Take a place, prepare the prompts within it, submit. The time limit holds from the header on."""
        began = request.scope["began"]
        deadline = began + service.settings.request_timeout
        with service.admission.take(choices) as reservation:
            try:
                async with asyncio.timeout_at(deadline):
                    asks, shape = await prepare()
                    scored = any(ask.logprobs is not None or ask.prompt_logprobs is not None for ask in asks)
                    if service.filter is not None and scored:
                        told = "log-probabilities are not given while a content filter is on"
                        raise bad_request(told, "logprobs")
                    generation = await service.generate(
                        options,
                        asks,
                        reservation,
                        began=began,
                        request_id=request.scope["request_id"],
                        defaults=defaults,
                        seed=seed,
                    )
            except TimeoutError:
                raise timed_out() from None
        return Answering(generation, shape, stream=bool(options.stream), deadline=deadline)

    @app.post("/v1/chat/completions", **_documented(ChatRequest, "openai"))
    async def chat(request: Request) -> Response:
        """A conversation's next message."""
        data = parse_json(request.scope["body"])
        given = validate(ChatRequest, data)
        service.check_model(given.model)
        thinking = given.thinking
        if thinking is None and given.reasoning_effort is not None:
            thinking = given.reasoning_effort != "none"
        logprobs = (given.top_logprobs or 0) if given.logprobs else None
        most = given.max_tokens if given.max_tokens is not None else given.max_completion_tokens
        shape = ChatShape(
            names,
            service.settings.model_id,
            given.n or 1,
            stream=bool(given.stream),
            include_usage=_usage(given),
            logprobs=bool(given.logprobs),
        )

        async def prepare() -> Prepared:
            prompt = await service.render(
                data["messages"],
                data.get("tools"),
                request.scope["request_id"],
                tool_choice=data.get("tool_choice"),
                thinking=thinking,
                add_generation_prompt=given.add_generation_prompt is not False,
                continue_final_message=bool(given.continue_final_message),
            )
            guide = await guide_for(given, prompt.primer, service)
            parallel = given.parallel_tool_calls is not False
            return [ChatAsk(prompt, most, logprobs, guide=guide, parallel=parallel)], shape

        return await answer(request, given, given.n or 1, prepare, given.seed, **OPENAI_DEFAULTS)

    @app.post("/v1/completions", **_documented(CompletionRequest, "openai"))
    async def completions(request: Request) -> Response:
        """The text that follows each prompt."""
        given = validate(CompletionRequest, parse_json(request.scope["body"]))
        service.check_model(given.model)
        most = COMPLETION_TOKENS if given.max_tokens is None else given.max_tokens
        scored = given.logprobs if given.echo else None
        decode = service.model.tokenizer.decode
        echo = None
        if given.echo:
            echo = [text if isinstance(text, str) else decode(text) for text in given.prompts]
        shape = CompletionShape(
            names,
            service.settings.model_id,
            given.n or 1,
            include_usage=_usage(given),
            logprobs=given.logprobs,
            echo=echo,
        )

        async def prepare() -> Prepared:
            prompts = [await service.encode(prompt, request.scope["request_id"]) for prompt in given.prompts]
            guide = await guide_for(given, [], service)
            return [Ask(prompt, most, given.logprobs, scored, guide) for prompt in prompts], shape

        choices = (given.n or 1) * len(given.prompts)
        return await answer(request, given, choices, prepare, given.seed, **OPENAI_DEFAULTS)

    @app.post("/generate", **_documented(GenerateRequest, "generate"))
    async def generate(request: Request) -> Response:
        """One prompt, given as text, ids or messages; greedy unless a temperature is given."""
        data = parse_json(request.scope["body"])
        given = validate(GenerateRequest, data)
        most = GENERATE_TOKENS if given.max_new_tokens is None else given.max_new_tokens

        async def prepare() -> Prepared:
            if given.messages is not None:
                prompt = await service.render(data["messages"], request_id=request.scope["request_id"])
            else:
                param = "prompt" if given.prompt is not None else "prompt_token_ids"
                prompt = await service.encode(getattr(given, param), request.scope["request_id"], param)
            guide = await guide_for(given, prompt.primer, service)
            plain = dataclasses.replace(prompt, primer=[])  # the text is that of the ids, and no more
            return [Ask(plain, most, guide=guide)], GenerateShape(show_ids=service.filter is None)

        return await answer(request, given, 1, prepare, given.seed or 0)


def _usage(given: ChatRequest | CompletionRequest) -> bool:
    return given.stream_options is not None and bool(given.stream_options.include_usage)


def _page(app: FastAPI) -> None:
    """The chat page: the files of `static`, by exact name, read once."""
    files = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.is_file()}

    def send(name: str) -> Response:
        if name not in files:
            raise ApiError(404, PHRASES[404])
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(files[name], media_type=kind, headers={"content-security-policy": _PAGE_POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return send("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return send(name)


# --- the description at /openapi.json ----------------------------------------------------------------------

_STATUSES = {
    400: "The request is not valid.",
    401: "No valid API key.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full.",
    503: "Loading, draining or too many connections.",
    504: "The time limit was reached.",
}


def _documented(model: type[Strict], tag: str) -> dict[str, Any]:
    """Bodies are read by `parse_json`, not by FastAPI: the description names their schema all the same."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "tags": [tag],
        "responses": {
            200: {"content": {"application/json": {}, "text/event-stream": {}}},
            **{status: {"description": told, "content": error} for status, told in _STATUSES.items()},
        },
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = FastAPI.openapi(app)
        _, definitions = models_json_schema(
            [(model, "validation") for model in REQUESTS], ref_template="#/components/schemas/{model}"
        )
        components = found.setdefault("components", {}).setdefault("schemas", {})
        components |= definitions["$defs"]
        components["Error"] = _ERROR_SCHEMA
        app.openapi_schema = found
    return app.openapi_schema


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
