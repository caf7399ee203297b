"""Texts of requests: there while a job may read them, gone afterwards, over a kill of the server too."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nybble.engine.errors import EngineError
from nybble.server.job_store import JobStore
from nybble.server.job_texts import JobTexts
from played_jobs import RESULT, Played

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
    with pytest.raises(EngineError, match="the texts cannot be stored"):
        JobTexts(tmp_path / "none").write(["a"])
