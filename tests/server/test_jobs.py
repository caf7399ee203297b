"""The queue of jobs at the moments that requests seldom meet: a task process is played by hand."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from nybble.engine.errors import ConflictError
from nybble.server import jobs as module
from nybble.server.job_store import JobRecord
from nybble.server.quantizations import events
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


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({}, "succeeded"),
        (
            {"gate": {"max_nll_increase": 0.0001, "nll_increase": 0.58861, "passed": False}},
            "succeeded, but did not pass its gate: NLL +0.5886 > 0.0001",
        ),
        (
            {"gate": {"max_nll_increase": 0.05, "nll_increase": -0.01, "passed": True}},
            "succeeded and passed its gate: NLL -0.0100 <= 0.05",
        ),
    ],
)
async def test_the_log_tells_what_became_of_the_gate(
    gate: Any, said: str, played: Played, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nybble")
    job = await played.submit("x")
    (await played.started(1)).ends.put_nowait(RESULT | gate)
    await played.end(job)
    assert f"job {job.id} (x): {said}" in caplog.messages


async def test_the_log_has_the_words_of_the_request(played: Played, caplog: pytest.LogCaptureFixture) -> None:
    """Not the terminal's, nor the name under which its texts are kept."""
    caplog.set_level("INFO", "nybble")
    path = str(played.folder / "texts-1.jsonl")
    job = await played.submit("x", calibration=path)
    task = await played.started(1)
    task.ends.put_nowait({"event": "log", "line": "few tokens of texts-1.jsonl: more (--num-samples)"})
    message = f"--calibration {path}: too few; use --method rtn"
    task.ends.put_nowait({"event": "error", "code": "invalid", "message": message})
    await played.end(job)
    assert f"job {job.id}: few tokens of texts: more ('num_samples')" in caplog.messages
    assert f"job {job.id} (x): failed: 'calibration' texts: too few; use 'method' rtn" in caplog.messages


async def test_events_are_sent_where_something_changed(played: Played) -> None:
    """The queue wakes all that watch it, for every job."""
    first, second = await played.submit("x"), await played.submit("y")
    task = await played.started(1)
    states: list[str] = []

    async def follow() -> None:
        async for event in events(played.jobs, second):
            states.append(json.loads(event.partition(b"data: ")[2])["status"])

    following = asyncio.create_task(follow())
    for done in range(5):
        task.ends.put_nowait({"event": "progress", "phase": "blocks", "done": done, "total": 9})
        async with asyncio.timeout(10):
            while first.progress.get("done") != done:
                await asyncio.sleep(0.001)
    task.ends.put_nowait(RESULT)
    task = await played.started(2)
    async with asyncio.timeout(10):
        while states[-1] != "running":
            await asyncio.sleep(0.001)
        task.ends.put_nowait(RESULT)
        await following
    assert states == ["queued", "running", "succeeded"]


async def test_who_watches_hears_something_whatever_other_jobs_do(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies cut a stream that is silent for long."""
    monkeypatch.setattr("nybble.server.quantizations._KEEPALIVE_SECONDS", 0.2)
    await played.submit("x")
    second = await played.submit("y")
    task = await played.started(1)

    async def report() -> None:
        for done in range(10**6):
            task.ends.put_nowait({"event": "progress", "phase": "blocks", "done": done, "total": 9})
            await asyncio.sleep(0.02)

    reporting, stream = asyncio.create_task(report()), events(played.jobs, second)
    async with asyncio.timeout(10):
        assert (await anext(stream)).startswith(b"event: progress")
        assert await anext(stream) == b": keep-alive\n\n"
    reporting.cancel()
    await stream.aclose()  # type: ignore[attr-defined]


async def test_events_end_with_an_error_where_the_server_leaves(played: Played) -> None:
    job = await played.submit("x")
    await played.started(1)
    stream = events(played.jobs, job)
    seen = [await anext(stream)]
    asyncio.get_running_loop().call_later(0.01, played.jobs.leave)
    async with asyncio.timeout(10):
        seen += [event async for event in stream]
    kind, _, data = seen[-1].partition(b"\ndata: ")
    error = json.loads(data)["error"]
    assert (kind, error["type"]) == (b"event: error", "service_unavailable")
    assert error["message"] == f"the server is shutting down; job {job.id} goes on when it starts again"
    assert [event for event in seen if event.startswith(b"event: end")] == []
