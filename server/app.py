"""The ASGI application: routes, error handlers, and the middleware around them."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from prometheus_client.exposition import choose_encoder
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..engine.errors import EngineError, NotFoundError, NybbleError
from .admin import Admin
from .auth import ApiKeys
from .chat import ChatWriter, chat_job
from .completions import CompletionWriter, completion_job
from .errors import HttpError, internal_error, request_error
from .gateway import Gateway
from .generate import Generation, Job
from .metrics import Metrics
from .openapi import request_schema
from .schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizePromptBody, chat_body, completion_body
from .sse import GenerationResponse, Writer
from .tokenize import detokenize, tokenize, tokenizer_info
from .wire import error_response, json_response, read_json

Handler = Callable[[Request], Awaitable[Response]]
Prepare = Callable[[Gateway, dict[str, Any]], Awaitable[tuple[Job, Writer, bool]]]


def build_app(gateway: Gateway, admin: Admin) -> ASGIApp:
    """The whole server as an ASGI application."""
    app = FastAPI(title="Nybble", version=__version__, redoc_url=None)
    _add_errors(app)
    _add_generation(app, gateway)
    _add_text(app, gateway)
    admin.add_routes(app)
    _add_models(app, gateway)
    _add_state(app, gateway)
    keys = [key.get_secret_value() for key in gateway.settings.api_key]
    if keys and gateway.settings.admin_key is not None:
        keys.append(gateway.settings.admin_key.get_secret_value())
    return CountResponses(ApiKeys(app, keys), gateway.metrics)


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    async def completions(request: Request) -> Response:
        """Continue one or many prompts."""
        return await _generate(gateway, request, _prepare_completion)

    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await _generate(gateway, request, _prepare_chat)

    _post(app, "/v1/completions", completions, CompletionBody)
    _post(app, "/v1/chat/completions", chat_completions, ChatBody)


async def _prepare_completion(gateway: Gateway, fields: dict[str, Any]) -> tuple[Job, Writer, bool]:
    body = completion_body(fields)
    job = await completion_job(body, gateway.models.get(body.model))
    return job, CompletionWriter(job, body), body.stream


async def _prepare_chat(gateway: Gateway, fields: dict[str, Any]) -> tuple[Job, Writer, bool]:
    body = chat_body(fields)
    job = await chat_job(body, gateway.models.get(body.model))
    return job, ChatWriter(job, body), body.stream


async def _generate(gateway: Gateway, request: Request, prepare: Prepare) -> Response:
    """From a request to its running generation. What ends here has never reached the engine."""
    record = gateway.metrics.accept()
    try:
        gateway.check_open()
        gateway.admission.check()
        fields = await read_json(request, gateway.settings.max_body_size)
        job, writer, stream = await prepare(gateway, fields)
        record.serve(job.model.metrics)
        permit = gateway.admission.admit(
            [len(job.prompt_of(index).token_ids) for index in range(len(job.params))]
        )
        generation = Generation(job, permit, record)
    except (NybbleError, ValidationError):
        record.end("rejected")
        raise
    except ClientDisconnect:
        record.end("aborted")
        raise
    except BaseException:
        record.end("failed")
        raise
    return GenerationResponse(generation, writer, record, stream)


def _add_text(app: FastAPI, gateway: Gateway) -> None:
    async def tokenize_route(request: Request) -> Response:
        """Token ids of a text, or of messages."""
        fields = await read_json(request, gateway.settings.max_body_size)
        return json_response(await tokenize(fields, gateway.models))

    async def detokenize_route(request: Request) -> Response:
        """The text of token ids."""
        fields = await read_json(request, gateway.settings.max_body_size)
        return json_response(detokenize(fields, gateway.models))

    async def tokenizer_info_route(request: Request) -> Response:
        """The tokenizer's special tokens."""
        return json_response(tokenizer_info(gateway.models))

    _get(app, "/tokenizer_info", tokenizer_info_route)
    _post(app, "/tokenize", tokenize_route, TokenizePromptBody)
    _post(app, "/detokenize", detokenize_route, DetokenizeBody)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    async def models(request: Request) -> Response:
        """What is served."""
        return json_response({"object": "list", "data": [model.card() for model in gateway.models.all()]})

    async def model(request: Request) -> Response:
        """One model."""
        return json_response(gateway.models.get(request.path_params["model_id"]).card())

    async def version(request: Request) -> Response:
        """This server's version."""
        return json_response({"version": __version__})

    _get(app, "/v1/models", models)
    _get(app, "/v1/models/{model_id:path}", model)
    _get(app, "/version", version)


def _add_state(app: FastAPI, gateway: Gateway) -> None:
    def answer(reason: str | None, good: str) -> Response:
        if reason is not None:
            return error_response(EngineError(reason))
        return json_response({"status": good})

    async def health(request: Request) -> Response:
        """Liveness: 503 only where a restart of this process would help."""
        return answer(gateway.unhealthy(), "healthy")

    async def ready(request: Request) -> Response:
        """Readiness: 503 while requests should go elsewhere."""
        return answer(gateway.not_ready(), "ready")

    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(
            encode(gateway.metrics.exposed), media_type=None, headers={"content-type": content_type}
        )

    _get(app, "/health", health)
    _get(app, "/ready", ready)
    _get(app, "/metrics", metrics)


def _get(app: FastAPI, path: str, handler: Handler) -> None:
    app.add_api_route(path, handler, methods=["GET"], response_model=None)
    app.add_api_route(path, handler, methods=["HEAD"], response_model=None, include_in_schema=False)


def _post(app: FastAPI, path: str, handler: Handler, body: type[Any]) -> None:
    extra = {"requestBody": request_schema(body)}
    app.add_api_route(path, handler, methods=["POST"], response_model=None, openapi_extra=extra)


def _add_errors(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        return error_response(error if isinstance(error, NybbleError) else internal_error())

    async def invalid(request: Request, error: Exception) -> Response:
        return error_response(
            request_error(error) if isinstance(error, ValidationError) else internal_error()
        )

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        if status == 404:
            return error_response(NotFoundError(f"no route {request.scope['path']:.200}; see /openapi.json"))
        response = error_response(HttpError(f"{request.method} is not allowed here", status=status))
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)
        return response

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx's status for it is counted

    async def bug(request: Request, error: Exception) -> Response:
        return error_response(internal_error())  # starlette raises the error again, uvicorn logs it

    app.add_exception_handler(NybbleError, ours)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, bug)


class CountResponses:
    """Middleware: counts each response by route, method and status, all from closed sets."""

    _METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._counter = metrics.http_responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in self._METHODS else "other"
                self._counter.labels(route, method, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
