"""Texts of requests: there while a job may read them, gone afterwards, over a kill of the server too."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nybble.engine.errors import EngineError
from nybble.server.job_store import JobRecord, JobStore
from nybble.server.job_texts import JobTexts
from nybble.server.jobs import Jobs
from nybble.server.lifecycle import admin_of
from nybble.server.quantizations import Quantizations
from nybble.server.settings import load_settings
from played_jobs import RESULT, Played
from prometheus_client import CollectorRegistry

# A server's jobs up to the moment that one runs, whose process is played; then it is killed.
KILLED = """
import asyncio, os, signal, sys
from contextlib import asynccontextmanager
from pathlib import Path
from nybble.server import jobs as module
from nybble.server.job_store import JobStore
from nybble.server.job_texts import JobTexts

folder = Path(sys.argv[1])

@asynccontextmanager
async def killing(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
    yield

async def main():
    module.task_process = killing
    store = JobStore(f"sqlite:///{folder / 'jobs.sqlite'}", str(folder))
    jobs = module.Jobs(store, JobTexts(folder), module.JobLimits(1))
    await jobs.start()
    async with jobs.texts() as texts:
        path = texts.write(["needed"])
        await jobs.submit({"output": "x", "options": {"out": str(folder / "x"), "calibration": str(path)}})
    async for _ in jobs.watch(jobs.all()[0]):
        pass

asyncio.run(main())
"""


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("texts-*")}


async def test_gone_when_the_last_job_that_names_them_has_ended(played: Played) -> None:
    async with played.jobs.texts() as texts:
        shared, own = texts.write(["a", "b"]), texts.write(["c"])
        first = await played.submit("x", calibration=str(shared), eval_text=str(own))
        second = await played.submit("y", eval_text=str(shared))
    assert kept(played.folder) == {shared.name, own.name}
    task = await played.started(1)
    assert own.read_text() == '{"text": "c"}\n'
    task.ends.put_nowait(RESULT)
    await played.end(first)
    assert kept(played.folder) == {shared.name}
    await played.started(2)
    assert (await played.jobs.cancel(second.id)).status == "cancelled"
    assert kept(played.folder) == set()


async def test_gone_where_no_job_came_of_the_request(played: Played) -> None:
    async with played.jobs.texts() as texts:
        assert texts.write(["a"]).exists()
    assert kept(played.folder) == set()


async def test_kept_where_the_end_could_not_be_stored(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start goes on with the job, which then needs them."""
    async with played.jobs.texts() as texts:
        path = texts.write(["a"])
        job = await played.submit("x", calibration=str(path))
    task = await played.started(1)

    def full(_: JobStore, __: object) -> None:
        raise EngineError("no space")

    monkeypatch.setattr(JobStore, "update", full)
    task.ends.put_nowait(RESULT)
    await played.end(job)
    async with played.jobs.texts():
        pass  # as any later request does
    assert path.exists()


async def test_a_cancelled_sweep_keeps_others_out_until_it_has_ended(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take the text of a request that came meanwhile for one of nobody's."""
    begun, go_on, sweep = threading.Event(), threading.Event(), JobTexts.keep

    def slow(self: JobTexts, readers: list[JobRecord]) -> None:
        begun.set()
        assert go_on.wait(10)
        sweep(self, readers)

    async def enter() -> None:
        async with played.jobs.texts():
            pass

    monkeypatch.setattr(JobTexts, "keep", slow)
    first = asyncio.create_task(enter())
    assert await asyncio.to_thread(begun.wait, 10)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first

    async def submit() -> Path:
        async with played.jobs.texts() as texts:
            path = texts.write(["a"])
            await played.submit("x", calibration=str(path))
        return path

    second = asyncio.create_task(submit())
    done, _ = await asyncio.wait([second], timeout=0.2)
    assert not done
    assert kept(played.folder) == set()
    go_on.set()
    assert (await second).exists()


async def test_a_request_that_is_cancelled_is_a_job_or_none(
    played: Played, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is neither left without a job, nor is a job left that only the database knows."""
    begun, go_on, write = threading.Event(), threading.Event(), JobTexts.write

    def slow(self: JobTexts, texts: list[str]) -> Path:
        begun.set()
        assert go_on.wait(10)
        return write(self, texts)

    monkeypatch.setattr(JobTexts, "write", slow)
    fleet: Any = SimpleNamespace(folders={"tiny": folder})
    service = Quantizations(played.jobs, fleet, played.folder, None)
    body = {"model": "tiny", "output": "x", "calibration": {"source": {"texts": ["a"]}}}
    request = asyncio.create_task(service.submit(body))
    assert await asyncio.to_thread(begun.wait, 10)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    go_on.set()
    task = await played.started(1)
    (job,) = played.jobs.all()
    assert kept(played.folder) == {Path(job.request["options"]["calibration"]).name}
    task.ends.put_nowait(RESULT)
    await played.end(job)
    assert kept(played.folder) == set()


async def test_another_database_leaves_the_texts_of_the_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both have a job of the same text."""
    models, tasks = tmp_path / "models", Played(tmp_path, monkeypatch)
    models.mkdir()

    @asynccontextmanager
    async def start(database: str | None) -> AsyncIterator[Jobs]:
        url = None if database is None else f"sqlite:///{tmp_path / database}"
        given = {"models_dir": models, "admin_key": "adm", "model": str(folder), "database_url": url}
        metrics = SimpleNamespace(registry=CollectorRegistry())
        gateway: Any = SimpleNamespace(settings=load_settings(given), metrics=metrics)
        fleet: Any = None
        async with admin_of(gateway, fleet) as admin:
            yield admin._service.jobs

    paths = []
    for count, database in enumerate(("first", "second", None), 1):
        async with start(database) as jobs:
            async with jobs.texts() as texts:
                paths.append(texts.write(["a"]))
                request = {
                    "output": "x",
                    "options": {"out": str(models / "x"), "calibration": str(paths[-1])},
                }
                await jobs.submit(request)
            await tasks.started(count)  # and is interrupted
        assert all(path.exists() for path in paths)
    async with start("second") as jobs:
        await jobs.cancel(jobs.all()[0].id)
    assert [path.exists() for path in paths] == [True, False, True]
    await tasks.jobs.stop()


async def test_a_server_that_stops_leaves_them_to_the_next(played: Played) -> None:
    async with played.jobs.texts() as texts:
        path = texts.write(["a"])
        await played.submit("x", calibration=str(path))
    await played.started(1)
    await played.jobs.stop()
    assert path.exists()


async def test_a_killed_server_leaves_no_text_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL
    needed = kept(tmp_path)
    assert len(needed) == 1
    for orphan in ("texts-of-a-job-that-ended.jsonl", "texts-half-written.partial"):
        (tmp_path / orphan).touch()
    again = Played(tmp_path, monkeypatch)
    await again.jobs.start()
    try:
        assert kept(tmp_path) == needed
        task = await again.started(1)
        (job,) = again.jobs.all()
        assert kept(tmp_path) == {Path(job.request["options"]["calibration"]).name}
        task.ends.put_nowait(RESULT)
        await again.end(job)
        assert (job.status, kept(tmp_path)) == ("succeeded", set())
    finally:
        await again.jobs.stop()


def test_the_same_texts_are_the_same_file(tmp_path: Path) -> None:
    """Also while a job reads it: its content is never half there under that name."""
    texts = JobTexts(tmp_path)
    path = texts.write(["a"])
    with path.open() as reading:
        assert texts.write(["a"]) == path
        assert reading.read() == path.read_text() == '{"text": "a"}\n'
    assert [path] == list(tmp_path.iterdir())


def test_texts_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="the texts cannot be stored"):
        JobTexts(tmp_path / "file").write(["a"])


def test_a_database_is_told_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file by its whole path, however it is said; others by their URL, whose password may change."""

    def mark(url: str) -> str:
        store = JobStore(url, str(tmp_path))
        store.close()
        return store.mark

    monkeypatch.chdir(tmp_path)
    assert (
        mark("sqlite:///a.sqlite") == mark(f"sqlite:///{tmp_path / 'a.sqlite'}") != mark("sqlite:///b.sqlite")
    )
    assert len(mark("sqlite:///a.sqlite")) == 12
