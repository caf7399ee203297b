"""A task of ``engine.tasks`` as a child of the event loop: its events, its limits, its end."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from ..engine.client import child_environment

STOP_SECONDS = 15.0  # what an interrupted task may take to remove its files
_MAX_LINE = 64 << 20  # a result lists every module

Json = dict[str, Any]
T = TypeVar("T")


def task_command(name: str) -> list[str]:
    """What starts the task ``name``."""
    # -P: the working directory's files must not shadow packages.
    return [sys.executable, "-P", "-m", "nybble.engine.tasks", name]


class TaskProcess:
    """A running task. Iterate over it once: its events; the last is a result or an error.

    A task that ends without a word gives an error event of its own, with code "killed".
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __aiter__(self) -> AsyncIterator[Json]:
        event = ""
        async for line in _pipe(self._process.stdout):
            content = json.loads(line)
            event = content["event"]
            yield content
        if event not in ("result", "error"):
            yield {"event": "error", "code": "killed", "message": _ending(await self._process.wait())}

    async def stop(self) -> None:
        """Interrupt it and wait; by force after STOP_SECONDS."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def task_process(
    name: str, options: Json, *, nice: int = 0, memory_limit: int | None = None
) -> AsyncIterator[TaskProcess]:
    """Start the task ``name``. Leaving the block ends it; so does the end of this process.

    nice: added to its niceness. memory_limit: bytes that it may allocate.
    """
    limits = ["--nice", str(nice), "--parent", str(os.getpid())]
    if memory_limit is not None:
        limits += ["--memory-limit", str(memory_limit)]
    process = await asyncio.create_subprocess_exec(
        *task_command(name),
        *limits,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(options.get("num_threads")),
        limit=_MAX_LINE,
    )
    task = TaskProcess(process)
    try:
        stdin = _pipe(process.stdin)
        with suppress(RuntimeError, ConnectionError):  # uvloop's and asyncio's words for a child that is gone
            stdin.write(json.dumps(options).encode())
        stdin.close()  # a child that died at once says so by its exit code
        yield task
    finally:
        await task.stop()


def _pipe(pipe: T | None) -> T:
    if pipe is None:
        raise RuntimeError("the child has no pipes")
    return pipe


def _ending(code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
    return f"the task ended without a word ({how})" + (", perhaps for lack of memory" if code == -9 else "")
