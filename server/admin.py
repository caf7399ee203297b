"""The routes that change the server: quantization jobs, models. They need the admin key."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..engine.errors import AuthError, ConflictError, ForbiddenError
from .gates import refused_by_gate
from .gateway import Gateway
from .openapi import request_schema
from .quantizations import (
    LoadBody,
    Quantizations,
    UnloadBody,
    events,
    quantization_body,
    shown,
)
from .switch import Switch
from .wire import json_response, read_json

Handler = Callable[[Request], Awaitable[Response]]


class Admin:
    """What those routes work on. ``quantizations`` None: the server has no --models-dir."""

    def __init__(self, gateway: Gateway, switch: Switch, quantizations: Quantizations | None) -> None:
        self._gateway = gateway
        self._switch = switch
        self._quantizations = quantizations

    def leave(self) -> None:
        """The server is about to end: streams of events end, and the load of a model that runs."""
        self._switch.leave()
        if self._quantizations is not None:
            self._quantizations.jobs.leave()

    def add_routes(self, app: FastAPI) -> None:
        """Put them all into the application."""
        jobs, one = "/v1/quantizations", "/v1/quantizations/{job_id}"
        self._add(app, "POST", jobs, self._submit, quantization_body())
        self._add(app, "GET", jobs, self._list)
        self._add(app, "GET", one, self._get)
        self._add(app, "DELETE", one, self._delete)
        self._add(app, "GET", f"{one}/events", self._events)
        self._add(app, "POST", f"{one}/cancel", self._cancel)
        self._add(app, "POST", "/v1/models/load", self._load, LoadBody)
        self._add(app, "POST", "/v1/models/unload", self._unload, UnloadBody)

    def _add(
        self, app: FastAPI, method: str, path: str, handler: Handler, body: type[BaseModel] | None = None
    ) -> None:
        async def guarded(request: Request) -> Response:
            self._check_key(request)
            return await handler(request)

        guarded.__name__, guarded.__doc__ = handler.__name__.strip("_"), handler.__doc__
        extra = None if body is None else {"requestBody": request_schema(body)}
        app.add_api_route(path, guarded, methods=[method], response_model=None, openapi_extra=extra)

    def _check_key(self, request: Request) -> None:
        """Errors: ForbiddenError, AuthError."""
        known = self._gateway.settings.admin_key
        if known is None:
            raise ForbiddenError("this route needs an admin key, and the server has none; set --admin-key")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise AuthError("this route needs the admin key; send it as 'Authorization: Bearer KEY'")
        if not hmac.compare_digest(key.strip().encode(), known.get_secret_value().encode()):
            raise ForbiddenError("this key is not the admin key")

    @property
    def _service(self) -> Quantizations:
        if self._quantizations is None:
            raise ForbiddenError("the server has no folder to write models to; set --models-dir")
        return self._quantizations

    async def _fields(self, request: Request) -> dict[str, Any]:
        self._gateway.check_open()
        return await read_json(request, self._gateway.settings.max_body_size)

    async def _submit(self, request: Request) -> Response:
        """Queue a quantization job."""
        service = self._service
        job = await service.submit(await self._fields(request))
        return json_response(shown(job), 202, {"location": f"/v1/quantizations/{job.id}"})

    async def _list(self, request: Request) -> Response:
        """All jobs, the newest first."""
        jobs = [shown(job) for job in reversed(self._service.jobs.all())]
        return json_response({"object": "list", "data": jobs})

    async def _get(self, request: Request) -> Response:
        """One job."""
        return json_response(shown(self._service.jobs.get(request.path_params["job_id"])))

    async def _events(self, request: Request) -> Response:
        """A job's progress as server-sent events, the last one named end."""
        jobs = self._service.jobs
        stream = events(jobs, jobs.get(request.path_params["job_id"]))
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(stream, headers=headers, media_type="text/event-stream")

    async def _cancel(self, request: Request) -> Response:
        """End a job that has not ended."""
        return json_response(shown(await self._service.jobs.cancel(request.path_params["job_id"])))

    async def _delete(self, request: Request) -> Response:
        """Forget a job that has ended; the checkpoint stays."""
        job = await self._service.jobs.remove(request.path_params["job_id"])
        return json_response({"id": job.id, "object": "quantization", "deleted": True})

    async def _load(self, request: Request) -> Response:
        """Serve a model under an alias, beside or instead of the one that has it."""
        service = self._service
        body = LoadBody.model_validate(await self._fields(request))
        folder = service.model_folder(body.model)
        reason = await asyncio.to_thread(refused_by_gate, folder, service.jobs.all())
        if reason is not None:
            raise ConflictError(f"'model' {body.model}: {reason}", param="model")
        return json_response(await self._switch.load(folder, body.alias, body.strategy))

    async def _unload(self, request: Request) -> Response:
        """Serve a name no more."""
        body = UnloadBody.model_validate(await self._fields(request))
        await self._switch.unload(body.model)
        return json_response({"id": body.model, "object": "model", "unloaded": True})
