"""A queue of jobs whose task processes are played by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nybble.server import jobs as module
from nybble.server.job_store import JobRecord, JobStore
from nybble.server.job_texts import JobTexts
from nybble.server.jobs import JobLimits, Jobs

RESULT = {"event": "result"}
KILLED = {"event": "error", "code": "killed", "message": "gone"}


class PlayedTask:
    """Tells what is put into ``ends``, whose last event is a result or an error; stopped, without a word."""

    def __init__(self) -> None:
        self.ends: asyncio.Queue[Any] = asyncio.Queue()
        self.stopped = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            event = await self.ends.get()
            yield event
            if event["event"] in ("result", "error"):
                return

    async def stop(self) -> None:
        self.stopped = True
        self.ends.put_nowait(KILLED)


class Played:
    """Jobs over a database in a folder; ``tasks``: the processes that were started."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.tasks: list[PlayedTask] = []
        self.texts = JobTexts(folder)
        store = JobStore(f"sqlite:///{folder / 'jobs.sqlite'}", str(folder))
        self.jobs = Jobs(store, self.texts, JobLimits(1))
        monkeypatch.setattr(module, "task_process", self._start)

    @asynccontextmanager
    async def _start(self, *_: Any, **__: Any) -> AsyncIterator[PlayedTask]:
        self.tasks.append(PlayedTask())
        yield self.tasks[-1]

    async def submit(self, output: str, **texts: str) -> JobRecord:
        """texts: the options that name some."""
        options = {"out": str(self.folder / output), **texts}
        source = {"source": {"texts": 1}}
        request = {"output": output, "calibration": source, "evaluation": source, "options": options}
        return await self.jobs.submit(request, 3)

    async def started(self, count: int) -> PlayedTask:
        """The task ``count``, once it is there."""
        async with asyncio.timeout(10):
            while len(self.tasks) < count:
                await asyncio.sleep(0.001)
        return self.tasks[count - 1]

    async def end(self, job: JobRecord) -> None:
        """Until ``job`` has ended."""
        async with asyncio.timeout(10):
            async for _ in self.jobs.watch(job):
                pass

    def blocks(self, output: str) -> Path:
        """What a run of ``output`` keeps, made here."""
        folder = self.folder / f".{output}.work"
        folder.mkdir()
        (folder / "block").touch()
        return folder
