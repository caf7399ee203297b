"""Engines as long-lived worker processes, so that rounds interleave; their memory and CPU time."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common import children, cpu_seconds

PEERS = Path(__file__).resolve().parent / "peers"
# Variables by which a shell would change an engine's threads or imports behind the benchmark's back.
_CLEARED = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMBA_NUM_THREADS", "GGML_", "PYTHON")


class Worker:
    """One process of ``peers/*.py``. A context manager; it ends with it."""

    def __init__(self, label: str, python: str, script: str, log: Path) -> None:
        self.label = label
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_CLEARED)}
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [python, str(PEERS / script)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One operation. SystemExit, with the end of its log, if the worker has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            raise SystemExit("\n".join([f"{self.label}: {op} failed, see {self._log}", *tail]))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        return cpu_seconds(self._process.pid)

    def proportional_bytes(self) -> int:
        """Proportional set size of the process and all it has started."""
        return tree_proportional_bytes(self._process.pid)


def tree_proportional_bytes(pid: int) -> int:
    """Sum of the proportional set sizes (shared pages count in part) of a process and its descendants."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    own = int(rollup.split("\nPss:")[1].split()[0]) * 1024
    return own + sum(map(tree_proportional_bytes, children(pid)))


def busy_seconds() -> float:
    """CPU time that the whole machine has spent working, from /proc/stat (steal of a hypervisor included)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Disturbance:
    """How many CPUs others took while a worker was measured: other workers, and everybody else."""

    def __init__(self, measured: Worker, all_workers: Sequence[Worker]) -> None:
        self._measured = measured
        self._others = [worker for worker in all_workers if worker is not measured]
        self._start = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        idle = sum(worker.cpu_seconds() for worker in self._others)
        return time.perf_counter(), busy_seconds(), self._measured.cpu_seconds(), idle

    def stop(self) -> dict[str, float]:
        """CPUs: of workers that should be idle, and of all foreign work on the machine."""
        seconds, busy, own, idle = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return {"seconds": seconds, "idle_workers": idle / seconds, "foreign": max(0.0, busy - own) / seconds}
