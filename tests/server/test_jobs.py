"""The queue of jobs at the moments that requests seldom meet: a task process is played by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from nybble.engine.errors import ConflictError
from nybble.server import jobs as module
from nybble.server.job_store import JobRecord
from played_jobs import RESULT, Played, PlayedTask


async def test_cancelled_before_its_process_is_there(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is said to run, but its first word to the database is not written yet."""
    gate, update = asyncio.Event(), played.jobs._save

    async def slow(job: JobRecord) -> None:
        if job.status == "running":
            await gate.wait()
        await update(job)

    monkeypatch.setattr(played.jobs, "_save", slow)
    job = await played.submit("x")
    async with asyncio.timeout(10):
        while job.status != "running":
            await asyncio.sleep(0.001)
    cancelled = asyncio.create_task(played.jobs.cancel(job.id))
    await asyncio.sleep(0.01)
    gate.set()
    assert (await cancelled).status == "cancelled"
    await asyncio.sleep(0.05)
    assert job.status == "cancelled"
    assert [task for task in played.tasks if not task.stopped] == []


async def test_a_job_that_is_being_cancelled_does_not_begin(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its blocks are removed the job before it ends."""
    first, second = await played.submit("x"), await played.submit("y")
    task = await played.started(1)
    blocks, rmtree = played.blocks("y"), module.shutil.rmtree
    removing, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(path: Path, ignore_errors: bool = False) -> None:
        loop.call_soon_threadsafe(removing.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
        rmtree(path, ignore_errors)

    monkeypatch.setattr(module.shutil, "rmtree", slow)
    cancelled = asyncio.create_task(played.jobs.cancel(second.id))
    await removing.wait()
    task.ends.put_nowait(RESULT)
    await played.end(first)
    await asyncio.sleep(0.05)
    go.set()
    assert (await cancelled).status == "cancelled"
    assert len(played.tasks) == 1
    assert not blocks.exists()


async def test_too_late_to_be_cancelled(played: Played) -> None:
    """The checkpoint is in its place by then: the job says so."""
    job = await played.submit("x")
    task = await played.started(1)
    task.ends.put_nowait(RESULT)
    with pytest.raises(ConflictError, match="has ended meanwhile: succeeded"):
        await played.jobs.cancel(job.id)
    assert job.status == "succeeded"


async def test_forgetting_a_job_leaves_the_blocks_of_another(played: Played) -> None:
    """Of the same output: an earlier one failed, the later one runs."""
    old = await played.submit("x")
    (await played.started(1)).ends.put_nowait({"event": "error", "code": "failed", "message": "no"})
    await played.end(old)
    blocks = played.blocks("x")
    new = await played.submit("x")
    task = await played.started(2)
    await played.jobs.remove(old.id)
    assert (blocks / "block").exists()
    task.ends.put_nowait({"event": "error", "code": "failed", "message": "no"})
    await played.end(new)
    await played.jobs.remove(new.id)
    assert [path.name for path in played.folder.iterdir()] == ["jobs.sqlite"]


async def test_the_number_of_layers_is_stored_at_once(played: Played) -> None:
    await played.submit("x")
    waiting = await played.submit("y")
    stored = await asyncio.to_thread(played.jobs._store.load)
    assert {job.id: job.progress["num_layers"] for job in stored}[waiting.id] == 3


async def test_stopped_while_a_process_is_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the event loop swallows the cancellation, as uvloop did at a start: the server must end all the
    same, and the job be there for the next one."""
    played = Played(tmp_path, monkeypatch)
    starting = asyncio.Event()

    @asynccontextmanager
    async def deaf(*_: Any, **__: Any) -> AsyncIterator[PlayedTask]:
        starting.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        async with played._start() as task:
            yield task

    monkeypatch.setattr(module, "task_process", deaf)
    await played.jobs.start()
    job = await played.submit("x")
    await starting.wait()
    async with asyncio.timeout(5):
        await played.jobs.stop()
    assert job.status == "queued"
    assert [task.stopped for task in played.tasks] == [True]
