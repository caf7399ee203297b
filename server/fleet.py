"""The engines of one server: started, put behind a name, switched, retired."""

import asyncio
import itertools
import logging
import time
from pathlib import Path

from ..engine.client import EngineClient
from ..engine.errors import ConfigError, EngineDeadError
from .metrics import Metrics
from .models import ModelTable, ServedModel, load_model
from .settings import Settings

logger = logging.getLogger("nybble")
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 1.0  # for requests that have found the model but are still being tokenized


class Fleet:
    """Engines and the names they answer to. All methods belong to one event loop.

    gave_up: set when an engine that is served is not started again; ``failure`` says why.
    folders: of every name that was ever served.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.models = ModelTable()
        self.gave_up = asyncio.Event()
        self.failure: ConfigError | EngineDeadError | None = None
        self.folders: dict[str, Path] = {}
        self._settings = settings
        self._metrics = metrics
        self._numbers = itertools.count(1)
        self._clients: list[EngineClient] = []
        self._watchers: dict[EngineClient, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def prepare(self, settings: Settings, folder: Path, name: str) -> ServedModel:
        """The model in ``folder`` with an engine that is not started: ``model.client.start()``.

        Errors: ConfigError where the gateway itself cannot use the model's files.
        """
        metrics, number = self._metrics.of(name), next(self._numbers)
        client = EngineClient(
            settings.engine_config(folder),
            watchdog_seconds=settings.hang_timeout,
            on_stats=lambda stats: metrics.step(stats, number),
            on_log=logger.info,
        )
        model = load_model(settings, folder, name, client, self._metrics)
        self._clients.append(client)
        return model

    def serve(self, model: ServedModel) -> ServedModel | None:
        """New requests for the model's name go to it. Returns what had the name until now."""
        self.folders[model.name] = model.folder
        return self.models.put(model)

    def watch(self, model: ServedModel) -> None:
        """From now on the end of this engine is the server's."""
        self._watchers[model.client] = asyncio.create_task(self._watch(model.client))

    def retire(self, model: ServedModel) -> None:
        """``drain`` in the background."""
        task = asyncio.create_task(self.drain(model))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def drain(self, model: ServedModel) -> None:
        """End the engine of a model that has no name any more, once its requests are done."""
        deadline = time.monotonic() + self._settings.drain_timeout
        await asyncio.sleep(_GRACE_SECONDS)
        while model.client.outstanding and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if model.client.outstanding:
            logger.warning(
                "%d requests of the former '%s' outlast --drain-timeout: they end with an error",
                model.client.outstanding,
                model.name,
            )
        await self.stop_engine(model.client)

    async def stop_engine(self, client: EngineClient) -> None:
        """End an engine and what it still computes."""
        if (watcher := self._watchers.pop(client, None)) is not None:
            watcher.cancel()
        if client in self._clients:
            self._clients.remove(client)
            await client.stop()

    async def stop(self) -> None:
        """End all engines."""
        for task in [*self._retiring]:
            task.cancel()
        await asyncio.gather(*(self.stop_engine(client) for client in [*self._clients]))

    @property
    def pids(self) -> list[int]:
        """The processes of all engines."""
        return [client.pid for client in self._clients if client.pid is not None]

    async def _watch(self, client: EngineClient) -> None:
        await client.gave_up.wait()
        self.failure = client.failure
        self.gave_up.set()
