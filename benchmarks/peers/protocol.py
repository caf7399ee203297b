"""What every worker speaks: one JSON object per line, a request on stdin, its reply on stdout.

Standard library only: workers run in the interpreters of other engines. A worker computes only between a
request and its reply.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Handler = Callable[..., dict[str, Any]]


def serve(**operations: Handler) -> None:
    """Answer requests ``{"op": NAME, ...arguments}`` until stdin ends.

    What libraries print goes to stderr. An exception ends the worker with its traceback there.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        reply = operations[request.pop("op")](**request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in packages}


@dataclass
class Stopwatch:
    """When how many tokens of a batch of streams had come."""

    streams: int
    began: float = field(default_factory=time.perf_counter)
    marks: list[tuple[float, int]] = field(default_factory=list)  # seconds since began, tokens so far
    tokens: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in range(self.streams)]

    def step(self, found: Iterable[tuple[int, int]]) -> None:
        """After a step: the tokens it brought, as (stream, token id)."""
        for stream, token in found:
            self.tokens[stream].append(int(token))
        if any(self.tokens):
            self.marks.append((time.perf_counter() - self.began, sum(map(len, self.tokens))))

    def result(self, skip_last: bool = False) -> dict[str, Any]:
        """Seconds to the first token of every stream, then tokens and seconds of decoding after it.

        ``skip_last``: the last step of the engine only hands out what the one before has computed.
        """
        first = next(i for i, (_, count) in enumerate(self.marks) if count >= self.streams)
        last = len(self.marks) - 1 - skip_last
        decoded = last > first
        return {
            "first_seconds": self.marks[first][0],
            "decode_tokens": self.marks[last][1] - self.marks[first][1] if decoded else 0,
            "decode_seconds": self.marks[last][0] - self.marks[first][0] if decoded else 0.0,
            "tokens": self.tokens,
        }
