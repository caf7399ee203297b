"""A client that loads an OpenAI server with streams and notes when each piece of text came.

Plain asyncio sockets: a client library's own time per event would be measured with the server's.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Stream:
    """One finished stream. Times in seconds of time.perf_counter."""

    sent: float
    arrivals: tuple[float, ...]  # one per event that carried text
    num_tokens: int

    @property
    def first(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between events with text."""
        return [late - early for early, late in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Target:
    """Where the load goes."""

    url: str
    model: str
    key: str | None = None


class LoadError(Exception):
    """The server answered with something other than a stream."""


async def stream(target: Target, prompt: str, max_tokens: int, **more: Any) -> Stream:
    """One streaming completion of exactly ``max_tokens`` tokens on a connection of its own.

    more: fields of the request's body.
    """
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    arrivals: list[float] = []
    num_tokens = 0
    sent = time.perf_counter()
    async with aclosing(_events(target, "/v1/completions", body)) as events:
        async for event in events:
            now = time.perf_counter()
            if "error" in event:
                raise LoadError(event["error"].get("message", event["error"]))
            if any(choice.get("text") for choice in event["choices"]):
                arrivals.append(now)
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    if not arrivals:
        raise LoadError("the stream carried no text")
    return Stream(sent, tuple(arrivals), num_tokens)


async def run(target: Target, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[Stream]:
    """All prompts, ``concurrency`` at a time: each stream that ends makes room for the next."""
    waiting = iter(prompts)

    async def work() -> list[Stream]:
        return [await stream(target, prompt, max_tokens) for prompt in waiting]

    async with asyncio.TaskGroup() as group:
        workers = [group.create_task(work()) for _ in range(concurrency)]
    return [done for worker in workers for done in worker.result()]


async def _events(target: Target, path: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
    """The JSON of each server-sent event."""
    parts = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        payload = json.dumps(body).encode()
        head = [
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(payload)}",
            "Connection: close",
            *([f"Authorization: Bearer {target.key}"] if target.key else []),
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + payload)
        status, headers = await _head(reader)
        if status != 200 or "text/event-stream" not in headers.get("content-type", ""):
            raise LoadError(f"status {status}: {(await reader.read()).decode(errors='replace')[:300]}")
        pending = b""
        async for chunk in _chunks(reader):
            *whole, pending = (pending + chunk).split(b"\n\n")
            for event in whole:
                data = event.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a chunked body."""
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
