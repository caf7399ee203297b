"""The queue of quantization jobs: one at a time in a process of its own, kept in a database, resumed."""

import asyncio
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..engine.errors import ConflictError, EngineError, NotFoundError
from ..engine.model_files import compared
from ..engine.quantize.options import resumable
from .job_store import JobRecord, JobStore, Status
from .job_texts import JobTexts
from .job_words import shown_message
from .pace import Pace
from .task_process import Json, TaskProcess, task_process

logger = logging.getLogger("nybble")
_SAVE_SECONDS = 5.0  # between two writes of a running job's progress
_CANCEL_SECONDS = 30.0
_ATTEMPTS = 3  # of a job whose process is killed: each goes on from the last finished block


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Of a job's process: threads, bytes that it may allocate (None: any), what is added to its niceness."""

    num_threads: int
    memory: int | None = None
    nice: int = 10  # streams come first where they share a core


class Jobs:
    """Quantization jobs, the oldest first. All methods belong to one event loop."""

    def __init__(self, store: JobStore, texts: JobTexts, limits: JobLimits) -> None:
        self._store = store
        self._texts = texts
        self._limits = limits
        self._jobs: dict[str, JobRecord] = {}
        self._changed = asyncio.Event()  # replaced at each change: whoever waits for the old one wakes
        self._running: tuple[JobRecord, TaskProcess] | None = None
        self._cancelling: set[str] = set()
        self.num_ended: Counter[Status] = Counter()  # since this server started
        self.num_gates: Counter[bool] = Counter()  # of those that succeeded: passed or not
        self.leaving = False
        self._closing = False
        self._runner: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # of the store
        self._texts_lock = asyncio.Lock()
        self._stored_ends: set[str] = set()  # jobs that no later start goes on with

    async def start(self) -> None:
        """Read the jobs; what was running when the server ended goes on. Errors: EngineError."""
        for job in await asyncio.to_thread(self._store.load):
            self._jobs[job.id] = job
            if job.status == "running":
                job.status = "queued"
            if job.ended:
                self._stored_ends.add(job.id)
            elif (gate := job.request.get("gate")) is not None:
                # Before 0.1's end a gate lay in the request only.
                job.request["options"].setdefault("max_nll_increase", gate["max_nll_increase"])
        async with self.texts():
            pass  # what a killed server left of jobs that had ended, or never began
        self._runner = asyncio.create_task(self._run(), name="quantization jobs")

    def leave(self) -> None:
        """The server is about to end: whoever watches a job wakes, and finds ``leaving``."""
        self.leaving = True
        self._notify()

    async def stop(self) -> None:
        """Interrupt the running job, which the next start resumes."""
        self._closing = True
        interrupted = None
        if self._running is not None:
            interrupted, task = self._running
            await task.stop()
        if self._runner is not None:
            # Python 3.11's wait_for may swallow it (where what it waits for is done): _closing ends it then.
            self._runner.cancel()
            with suppress(asyncio.CancelledError):
                await self._runner
        if interrupted is not None and not interrupted.ended:
            output = interrupted.request["output"]
            logger.info("job %s (%s): interrupted; the next start goes on with it", interrupted.id, output)
        self._store.close()

    def all(self) -> list[JobRecord]:
        """In the order in which they were sent."""
        return list(self._jobs.values())

    def get(self, job_id: str) -> JobRecord:
        """Errors: NotFoundError."""
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(f"no quantization job '{job_id:.60}'; GET /v1/quantizations lists them")
        return job

    async def submit(self, request: Json, num_layers: int | None = None) -> JobRecord:
        """Queue a job. Errors: ConflictError where another one makes the same output, EngineError."""
        if (maker := self._maker(request["output"])) is not None:
            remedy = "choose another name, or cancel that job first"
            raise ConflictError(
                f"'output' {request['output']}: job {maker.id} makes it; {remedy}", param="output"
            )
        job = JobRecord(f"quant-{uuid4().hex}", int(time.time()), request)
        job.progress["num_layers"] = num_layers
        self._jobs[job.id] = job  # at once: a second request of the same output must find it
        try:
            await self._write(self._store.add, job)
        except BaseException:
            del self._jobs[job.id]
            raise
        self._notify()
        return job

    async def cancel(self, job_id: str) -> JobRecord:
        """End a job that has not ended; returns once it has. Errors: NotFoundError, ConflictError."""
        job = self.get(job_id)
        if job.ended:
            raise ConflictError(f"job {job.id} has ended: {job.status}")
        self._cancelling.add(job.id)  # from here on it does not begin, nor begin again
        if job.status == "queued":
            await self._end(job, "cancelled")
            self._cancelling.discard(job.id)
            return job
        if self._running is not None and self._running[0] is job:
            await self._running[1].stop()
        async with asyncio.timeout(_CANCEL_SECONDS):
            async for _ in self.watch(job):
                pass
        if job.status != "cancelled":
            raise ConflictError(f"job {job.id} has ended meanwhile: {job.status}")
        return job

    async def remove(self, job_id: str) -> JobRecord:
        """Forget a job that has ended, not what it made. Errors: NotFoundError, ConflictError."""
        job = self.get(job_id)
        if not job.ended:
            raise ConflictError(f"job {job.id} is {job.status}; cancel it first")
        await self._write(self._store.remove, job)
        del self._jobs[job.id]
        self._stored_ends.discard(job.id)
        if self._maker(job.request["output"]) is None:  # else the blocks are that job's
            aside = _set_aside(job)  # before another job of the same output can begin
            await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
        return job

    @asynccontextmanager
    async def texts(self) -> AsyncIterator[JobTexts]:
        """The texts of requests. None is removed inside; on leaving, those that no job may still read."""
        await self._texts_lock.acquire()
        try:
            yield self._texts
        finally:
            await asyncio.shield(self._sweep_texts())

    async def _sweep_texts(self) -> None:
        """Gives the lock back only when its thread has ended, also where whoever waits is cancelled."""
        try:
            readers = [job for job in self._jobs.values() if job.id not in self._stored_ends]
            await asyncio.to_thread(self._texts.keep, readers)
        finally:
            self._texts_lock.release()

    def _maker(self, output: str) -> JobRecord | None:
        """The job that has not ended and makes ``output``."""
        found = (j for j in self._jobs.values() if not j.ended and j.request["output"] == output)
        return next(found, None)

    async def watch(self, job: JobRecord) -> AsyncIterator[None]:
        """An item at once and after each change, the last when the job has ended."""
        while True:
            changed = self._changed
            yield
            if job.ended:
                return
            await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _write(self, operation: Any, job: JobRecord) -> None:
        async with self._lock:
            await asyncio.to_thread(operation, job)

    async def _save(self, job: JobRecord) -> None:
        """What cannot be stored now is logged: the job itself must not fail by it."""
        try:
            await self._write(self._store.update, job)
            if job.ended:
                self._stored_ends.add(job.id)
                async with self.texts():
                    pass
        except EngineError as error:
            logger.error("job %s: %s", job.id, error)
        self._notify()

    async def _end(self, job: JobRecord, status: Status, error: Json | None = None) -> None:
        if status == "cancelled":
            await asyncio.to_thread(shutil.rmtree, _blocks(job), ignore_errors=True)
        job.status, job.error, job.finished_at = status, error, int(time.time())
        self.num_ended[status] += 1
        if (gate := _gate(job)) is not None:
            self.num_gates[gate["passed"]] += 1
        logger.info("job %s (%s): %s", job.id, job.request["output"], _ending(job))
        await self._save(job)

    async def _run(self) -> None:
        while not self._closing:
            changed = self._changed
            waiting = (
                j for j in self._jobs.values() if j.status == "queued" and j.id not in self._cancelling
            )
            job = next(waiting, None)
            if job is None:
                await changed.wait()
                continue
            try:
                await self._execute(job)
            except Exception:
                logger.exception("job %s", job.id)
                await self._end(job, "failed", {"code": "internal", "message": "see the server's log"})

    async def _execute(self, job: JobRecord) -> None:
        job.status, job.started_at = "running", job.started_at or int(time.time())
        logger.info("job %s (%s): running", job.id, job.request["output"])
        await self._save(job)
        for attempt in range(1, _ATTEMPTS + 1):
            last = await self._attempt(job)
            if last.get("code") != "killed" or self._closing or job.id in self._cancelling:
                break
            logger.warning("job %s: %s (attempt %d of %d)", job.id, last["message"], attempt, _ATTEMPTS)
        if last["event"] == "result":  # also where it was to be cancelled: the checkpoint is there
            job.result = {name: value for name, value in last.items() if name != "event"}
            job.progress["eta_seconds"] = 0
            await self._end(job, "succeeded")
        elif job.id in self._cancelling:
            await self._end(job, "cancelled")
        elif self._closing:
            job.status = "queued"
            await self._save(job)
        else:
            error = {
                "code": last.get("code", "failed"),
                "message": last["message"],
                "layer": last.get("layer"),
            }
            await self._end(job, "failed", error)
        self._cancelling.discard(job.id)

    async def _attempt(self, job: JobRecord) -> Json:
        """One process, which goes on where the last one ended; its last event."""
        limits = self._limits
        options = {**job.request["options"], "num_threads": limits.num_threads, "resume": "anew"}
        async with task_process("quantize", options, nice=limits.nice, memory_limit=limits.memory) as task:
            self._running = (job, task)
            try:
                if self._closing or job.id in self._cancelling:
                    await task.stop()
                return await self._follow(job, task)
            finally:
                self._running = None

    async def _follow(self, job: JobRecord, task: TaskProcess) -> Json:
        """Keep the job's progress; returns the task's last event."""
        last: Json = {}
        pace = Pace()
        saved = time.monotonic()
        async for last in task:
            if last["event"] == "progress":
                job.progress |= _progress(last, pace)
                self._notify()
            elif last["event"] == "log":
                logger.info("job %s: %s", job.id, shown_message(last["line"], job.request))
            if time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                await self._save(job)
        return last


def _progress(event: Json, pace: Pace) -> Json:
    """A task's event as the API's progress; seconds to the end of the phase, None while unknown."""
    left = pace.seconds_left(event)
    shown = {name: event[name] for name in ("phase", "done", "total")}
    shown["eta_seconds"] = None if left is None else round(left, 1)
    return shown | {name: event[name] for name in ("layer", "loss") if name in event}


def _gate(job: JobRecord) -> Json | None:
    """The verdict on what it made: a checkpoint may be whole and not fit to be served."""
    gate: Json | None = (job.result or {}).get("gate")
    return gate


def _ending(job: JobRecord) -> str:
    """How it ended, for the log."""
    if job.error is not None:
        return f"{job.status}: {shown_message(job.error['message'], job.request)}"
    if (gate := _gate(job)) is None:
        return job.status
    said = " and passed" if gate["passed"] else ", but did not pass"
    return f"{job.status}{said} its gate: NLL {compared(gate)}"


def _blocks(job: JobRecord) -> Path:
    """What an unfinished run leaves."""
    return resumable(Path(job.request["options"]["out"]))


def _set_aside(job: JobRecord) -> Path:
    """Where its blocks are then, which is as good as removed: ``remove_leftovers`` knows the name."""
    blocks = _blocks(job)
    aside = blocks.with_name(f"{blocks.name.removesuffix('.work')}.{os.getpid()}.work")
    with suppress(FileNotFoundError):
        blocks.rename(aside)
    return aside
