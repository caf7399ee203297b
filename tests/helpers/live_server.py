"""A real server process with the built-in demo model, and what tests need to talk to it."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo" / "bf16"
START_SECONDS = 120.0  # a cold, busy CI machine; a quiet one needs about 3


@dataclass
class LiveServer:
    """``nybble serve`` as its own process."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def engine_pid(self) -> int:
        """The engine is the gateway's only child that runs the worker module."""
        listing = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=True,
        )
        pids = [
            int(line.split()[0]) for line in listing.stdout.splitlines() if "nybble.engine.worker" in line
        ]
        assert len(pids) == 1, listing.stdout
        return pids[0]

    def metric(self, name: str) -> float:
        """The sum of all samples of one metric, read from /metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll until ``condition`` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what} did not happen within {seconds} s\n{self.log.read_text()}"
            )
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """Whether /ready answers 200."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False


@contextlib.contextmanager
def serve(log: Path, *arguments: str) -> Iterator[LiveServer]:
    """Start a server on a free port, wait until it is ready, stop it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nybble.server.cli", "serve", *arguments, "--port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen([*command, "--drain-delay", "0"], stdout=sink, stderr=subprocess.STDOUT)
    server = LiveServer(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until(lambda: process.poll() is not None or server.is_ready(), START_SECONDS, "ready")
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
