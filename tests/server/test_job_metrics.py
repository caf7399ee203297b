"""Jobs in /metrics, over a database and without their processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nybble.server import jobs as module
from nybble.server.job_metrics import JobCollector
from nybble.server.job_store import JobStore
from nybble.server.jobs import JobLimits, Jobs
from prometheus_client import CollectorRegistry


class _Task:
    def __init__(self) -> None:
        self.last: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        yield await self.last

    async def stop(self) -> None:
        if not self.last.done():
            self.last.set_result({"event": "error", "code": "killed", "message": "killed"})


async def test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[_Task] = []

    @asynccontextmanager
    async def start(*_: Any, **__: Any) -> AsyncIterator[_Task]:
        tasks.append(_Task())
        yield tasks[-1]

    monkeypatch.setattr(module, "task_process", start)
    jobs = Jobs(JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}", str(tmp_path)), JobLimits(1))
    await jobs.start()
    registry = CollectorRegistry()
    registry.register(JobCollector(jobs))

    def shown() -> dict[str, float | None]:
        living = {s: registry.get_sample_value("nybble_quantization_jobs", {"status": s})
                  for s in ("queued", "running")}  # fmt: skip
        return living | {
            s: registry.get_sample_value("nybble_quantization_jobs_ended_total", {"status": s})
            for s in ("succeeded", "failed", "cancelled")
        }

    nothing = {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert shown() == nothing
    first, second, third = [
        await jobs.submit({"output": name, "options": {"out": str(tmp_path / name)}}, 1) for name in "xyz"
    ]
    async with asyncio.timeout(10):
        while not tasks:
            await asyncio.sleep(0.001)
        assert shown() == nothing | {"running": 1, "queued": 2}
        await jobs.cancel(third.id)
        tasks[0].last.set_result({"event": "result", "report": {}})
        async for _ in jobs.watch(first):
            pass
        while len(tasks) < 2:
            await asyncio.sleep(0.001)
        assert shown() == nothing | {"running": 1, "succeeded": 1, "cancelled": 1}
        tasks[1].last.set_result({"event": "error", "code": "failed", "message": "no"})
        async for _ in jobs.watch(second):
            pass
    assert shown() == nothing | {"succeeded": 1, "failed": 1, "cancelled": 1}
    await jobs.stop()
