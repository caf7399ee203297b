"""From options to a running server, and out again: engine, signals, drain, exit codes."""

import asyncio
import gc
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import uvicorn
import uvloop
from prometheus_client import disable_created_metrics
from starlette.types import ASGIApp

from ..engine.errors import ConfigError
from ..engine.model_files import resolve_model
from .admin import Admin
from .app import build_app
from .engine_metrics import EngineCollector, report_load
from .fleet import Fleet
from .gateway import Gateway, Phase
from .job_metrics import JobCollector
from .job_store import JobStore, only_server_of
from .job_texts import JobTexts
from .jobs import JobLimits, Jobs
from .limits import Admission
from .metrics import Metrics
from .models import ServedModel, served_name
from .quantizations import Quantizations
from .settings import Settings, limit_tokenizer_threads
from .sockets import LimitedProtocol, bind
from .switch import Switch

logger = logging.getLogger("nybble")

EXIT_OK, EXIT_ENGINE = 0, 1
_FLUSH_SECONDS = 2  # for the last words to clients once the drain's time is up
_POLL_SECONDS = 0.05


def serve(settings: Settings) -> int:
    """Run a server until it is told to stop; the process's exit code.

    Errors: ConfigError where an option, the model or the port cannot work.
    """
    started = time.monotonic()
    with bind(settings.host, settings.port) as listener:
        logging.basicConfig(
            stream=sys.stderr,
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(message)s",
        )
        disable_created_metrics()  # type: ignore[no-untyped-call]
        limit_tokenizer_threads()
        folder = resolve_model(settings.model, settings.revision)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings, folder, listener, started))


async def _serve(settings: Settings, folder: Path, listener: socket.socket, started: float) -> int:
    name = served_name(settings)
    metrics = Metrics(name, settings.vllm_metrics)
    fleet = Fleet(settings, metrics)
    try:
        model = fleet.prepare(settings, folder, name)
        await model.client.start()
        fleet.serve(model)
        fleet.watch(model)
        admission = Admission(settings.max_num_seqs, settings.max_queued_requests, settings.max_queued_tokens)
        gateway = Gateway(settings, fleet.models, metrics, admission)
        phases = {"gateway": time.monotonic() - started}
        metrics.registry.register(EngineCollector(fleet.models, phases))

        def announce() -> None:
            phases.update(_phases(time.monotonic() - started, phases["gateway"], model))
            print(_greeting(settings, model, listener, phases["total"]), flush=True)

        async with admin_of(gateway, fleet) as admin:
            code = await Lifecycle(gateway, fleet, listener, admin).run(announce)
    finally:
        await fleet.stop()
    logger.info("stopped")
    return code


@asynccontextmanager
async def admin_of(gateway: Gateway, fleet: Fleet) -> AsyncIterator[Admin]:
    """The routes that change the server. While inside, quantization jobs run where folder and key allow it.

    Errors: ConfigError, EngineError.
    """
    settings = gateway.settings
    switch, folder = Switch(settings, fleet), settings.models_dir
    if folder is None or settings.admin_key is None:
        if settings.admin_key is not None:
            off = "quantizing and loading (/v1/quantizations, /v1/models/load) answer 403; set --models-dir"
            logger.warning("--admin-key without --models-dir: %s", off)
        elif folder is not None:
            off = "quantizing, loading and unloading models answer 403; set --admin-key"
            logger.warning("--models-dir without --admin-key: %s", off)
        yield Admin(gateway, switch, None)
        return
    with only_server_of(folder) as hidden:
        url = settings.database_url or f"sqlite:///{hidden / 'jobs.sqlite'}"
        store = await asyncio.to_thread(JobStore, url, str(folder))
        limits = JobLimits(settings.quantize_threads, settings.quantize_memory)
        # Texts are removed when no job of the database names them: those of another's jobs lie elsewhere.
        texts = JobTexts(hidden / store.mark if settings.database_url else hidden)
        jobs = Jobs(store, texts, limits)
        await jobs.start()
        gateway.metrics.registry.register(JobCollector(jobs))
        try:
            yield Admin(gateway, switch, Quantizations(jobs, fleet, folder, settings.data_dir))
        finally:
            await jobs.stop()


class Lifecycle:
    """Serve until a signal or an engine's end; then drain."""

    def __init__(self, gateway: Gateway, fleet: Fleet, listener: socket.socket, admin: Admin) -> None:
        self._gateway = gateway
        self._fleet = fleet
        self._listener = listener
        self._admin = admin
        self._signal: signal.Signals | None = None
        self._stop = asyncio.Event()
        self._server = HttpServer(build_app(gateway, admin), gateway)

    async def run(self, announce: Callable[[], None]) -> int:
        """``announce`` is called once the model answers. Returns the exit code. Errors: ConfigError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        helpers = [
            asyncio.create_task(self._announce(announce)),
            asyncio.create_task(report_load(self._fleet.models, self._gateway.metrics)),
        ]
        waits = [asyncio.create_task(event.wait()) for event in (self._stop, self._fleet.gave_up)]
        try:
            await asyncio.wait([*waits, serving], return_when=asyncio.FIRST_COMPLETED)
            if not self._fleet.gave_up.is_set():
                await self._drain()
            self._gateway.phase = Phase.CLOSED
            self._admin.leave()
            await self._fleet.stop()  # what still runs ends with an error event
        finally:
            self._admin.leave()
            for task in (*helpers, *waits):
                task.cancel()
            self._server.should_exit = True
            await serving
        return self._exit_code()

    async def _announce(self, announce: Callable[[], None]) -> None:
        await self._fleet.models.all()[0].client.ready.wait()
        gc.collect()
        gc.freeze()  # what the start has made stays: later collections need not look at it
        announce()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal is not None:  # the second one: no time for manners
            for pid in self._fleet.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(128 + number)
        self._signal = number
        self._stop.set()

    async def _drain(self) -> None:
        """Unready, then closed to new requests, until the running ones are done or the time is up."""
        settings, admission = self._gateway.settings, self._gateway.admission
        self._gateway.phase = Phase.DRAINING
        # Routers need time to see /ready fail; at a terminal, or if it never held, there is none to wait for.
        loaded = any(model.client.info is not None for model in self._fleet.models.all())
        routed = self._signal is signal.SIGTERM and loaded
        delay = settings.drain_delay if routed else 0.0
        logger.info(
            "stopping: %d requests run; taking new ones for %g s more, then waiting up to %g s",
            admission.requests,
            delay,
            settings.drain_timeout,
        )
        await asyncio.sleep(delay)
        self._gateway.phase = Phase.CLOSED
        deadline = time.monotonic() + settings.drain_timeout
        while admission.requests and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if admission.requests:
            logger.warning("%d requests did not finish in time; they end with an error", admission.requests)

    def _exit_code(self) -> int:
        failure = self._fleet.failure
        if isinstance(failure, ConfigError):
            raise failure
        if failure is not None:
            logger.error("%s", failure)
            return EXIT_ENGINE
        return EXIT_OK


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signals and its polling."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=None if gateway.settings.log_level == "debug" else "warning",
                access_log=False,
                workers=1,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=75,  # beyond the usual 60 s of proxies, or they meet a closing socket
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )
        self._gateway = gateway

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are Lifecycle's."""
        yield

    async def main_loop(self) -> None:
        """Until told to stop; the date header needs a tick each second."""
        while not await self.on_tick(0):
            if self._gateway.phase is not Phase.SERVING:
                # Clients that keep their connection would never meet another server.
                self.server_state.default_headers = [
                    *self.server_state.default_headers,
                    (b"connection", b"close"),
                ]
            for _ in range(10):
                if self.should_exit:
                    return
                await asyncio.sleep(0.1)


def _phases(total: float, gateway: float, model: ServedModel) -> dict[str, float]:
    """What the engine does not count: its process until it begins to load, which imports torch."""
    return {"engine_process": total - gateway - sum(model.info.startup_seconds.values()), "total": total}


def _greeting(settings: Settings, model: ServedModel, listener: socket.socket, seconds: float) -> str:
    """Where the server is, and a line to copy and paste."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    body = json.dumps({"model": model.name, "prompt": "Once upon a time", "max_tokens": 48})
    key = ' -H "Authorization: Bearer $NYBBLE_API_KEY"' if settings.api_key else ""
    where = f"http://{host}:{port}"
    return (
        f"{model.name} is ready at {where} after {seconds:.1f} s. Try:\n"
        f"curl {where}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
    )
