"""Waiting for a server in tests, and asking it for a completion; standard library only."""

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], bool], seconds: float, pause: float = 0.05) -> None:
    """Poll until a condition holds; TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still false after {seconds} s")
        time.sleep(pause)


def answers(url: str) -> bool:
    """Whether a GET gets a 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def complete(url: str, max_tokens: int) -> Any:
    """The answer to a greedy completion by the first model of a server."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        model = json.load(response)["data"][0]["id"]
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
