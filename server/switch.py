"""Models loaded and unloaded while the server runs: both resident, the name switched, the old one drained."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Literal

from ..engine.errors import ConfigError, ConflictError, EngineError, NybbleError
from .fleet import Fleet
from .models import ServedModel, root_of, state_of
from .settings import Settings
from .task_process import task_process

logger = logging.getLogger("nybble")

Strategy = Literal["both", "replace"]

_LEAVES = "the server is shutting down; load it when it has started again"


class Switch:
    """One change at a time; a second one meanwhile is a ConflictError."""

    def __init__(self, settings: Settings, fleet: Fleet) -> None:
        self._settings = settings
        self._fleet = fleet
        self._busy = asyncio.Lock()
        self._loading: asyncio.Task[ServedModel] | None = None
        self._leaving = False

    async def load(self, folder: Path, alias: str, strategy: Strategy) -> dict[str, Any]:
        """Serve the model in ``folder`` as ``alias``; returns once it does.

        "both": the old model of that name answers until the new one does. "replace": it ends first, and comes
        back where the new one fails. What the name serves already, unchanged, is not loaded again. Errors:
        ConfigError where the model cannot be served, ConflictError where not both fit; then everything is as
        before.
        """
        self._refuse_second()
        async with self._busy:
            if self._leaving:
                raise EngineError(_LEAVES)
            started = time.monotonic()
            settings = self._settings_for(folder)
            what = f"{root_of(settings, folder)} as {alias!r}"
            before = next((model for model in self._fleet.models.all() if model.name == alias), None)
            if before is not None and _serves(before, folder):
                logger.info("%s is served already", what)
                return {**before.card(), "load_seconds": 0.0}
            logger.info("loading %s", what)
            self._loading = asyncio.create_task(self._load(settings, folder, alias, before, strategy))
            try:
                model = await self._interruptible(self._loading)
            except NybbleError as error:
                logger.warning("%s could not be loaded: %s", what, error.message)
                raise
            seconds = time.monotonic() - started
            instead = "" if before is None else f", in place of {before.root}"
            logger.info("loaded %s in %.1f s%s", what, seconds, instead)
            return {**model.card(), "load_seconds": round(seconds, 3)}

    def leave(self) -> None:
        """The server is about to end: whoever waits for a model is told."""
        self._leaving = True
        if self._loading is not None:
            self._loading.cancel()

    async def _interruptible(self, loading: asyncio.Task[ServedModel]) -> ServedModel:
        try:
            return await loading
        except asyncio.CancelledError:
            if not self._leaving:
                raise
            raise EngineError(_LEAVES) from None

    async def _load(
        self, settings: Settings, folder: Path, alias: str, before: ServedModel | None, strategy: Strategy
    ) -> ServedModel:
        report = await self._check(settings, folder)
        needed, free = report["weight_bytes"] + report["kv_bytes_one_request"], report["free_bytes"]
        ended = before if strategy == "replace" else None
        if ended is not None:
            return await self._replace(settings, folder, ended)
        if needed > free:
            remedy = "unload another model"
            if before is not None:
                remedy = f'use "strategy": "replace", which ends the old model first, or {remedy}'
            raise ConflictError(
                f"'{alias}' needs {needed} bytes beside what is served, {free} are free; {remedy}",
                param="strategy",
            )
        return await self._beside(settings, folder, alias)

    async def unload(self, name: str) -> None:
        """Serve the name no more; its requests are finished. Errors: ModelNotFoundError, ConflictError."""
        self._refuse_second()
        async with self._busy:
            self._fleet.models.get(name)
            if len(self._fleet.models.all()) == 1:
                raise ConflictError(f"'{name}' is the only model; stop the server instead", param="model")
            model = self._fleet.models.remove(name)
            self._fleet.retire(model)
            logger.info("%r unloaded (%s); its requests are finished first", name, model.root)

    def _refuse_second(self) -> None:
        if self._busy.locked():
            raise ConflictError("another model is being loaded or unloaded; try again when it is done")

    def _settings_for(self, folder: Path) -> Settings:
        """The server's options but those that describe its first model."""
        known = (model.settings.model for model in self._fleet.models.all() if model.folder == folder)
        own = {
            "model": next(known, str(folder)),
            "revision": None,
            "chat_template": None,
            "max_model_len": None,
        }
        return self._settings.model_copy(update=own)

    async def _check(self, settings: Settings, folder: Path) -> dict[str, Any]:
        """What ``nybble check`` says. ConfigError where the model would not load even alone."""
        options: dict[str, Any] = {"model": str(folder), "device": settings.device, "dtype": settings.dtype}
        last: dict[str, Any] = {}
        async with task_process("check", options) as task:
            async for event in task:
                last = event
        if last["event"] != "result":
            raise ConfigError(last["message"])
        if not last["weight_bytes"]:  # else what stands against it may be memory alone
            raise ConfigError("; ".join(last["problems"]))
        return last

    async def _beside(self, settings: Settings, folder: Path, alias: str) -> ServedModel:
        model = self._fleet.prepare(settings, folder, alias)
        await self._wait(model)
        before = self._fleet.serve(model)
        self._fleet.watch(model)
        if before is not None:
            self._fleet.retire(before)
        return model

    async def _replace(self, settings: Settings, folder: Path, before: ServedModel) -> ServedModel:
        model = self._fleet.prepare(settings, folder, before.name)
        self._fleet.serve(model)  # from here on the name answers 503: the model is loading
        await self._fleet.drain(before)
        try:
            await self._wait(model)
        except (ConfigError, EngineError):
            back = self._fleet.prepare(before.settings, before.folder, before.name)
            await back.client.start()
            self._fleet.serve(back)
            self._fleet.watch(back)
            raise
        self._fleet.watch(model)
        return model

    async def _wait(self, model: ServedModel) -> None:
        """Until its engine answers; else it is stopped. Errors: ConfigError, EngineError."""
        try:
            await model.client.start()
            await model.client.wait_ready()
        except BaseException:
            await self._fleet.stop_engine(model.client)
            raise


def _serves(model: ServedModel, folder: Path) -> bool:
    """Whether it answers, from the files that ``folder`` holds now."""
    return model.folder == folder and model.client.ready.is_set() and model.files == state_of(folder)
