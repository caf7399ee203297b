"""A quantization job on a server of ours: posted, watched from outside, ended; the memory of its process."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Server, children
from nybble.engine.model.config import ModelConfig
from nybble.engine.quantize.activations import activation_bytes
from nybble.engine.quantize.options import resumable

TICK = 0.02  # seconds between two looks
_TASK = b"nybble.engine.tasks"
_HESSIANS = (
    5  # [K, K] of the widest input: the one at hand, and four while it is factorized (GPTQ.peak_bytes)
)


@dataclass(frozen=True)
class Job:
    """A job that was posted. models_dir: the server's."""

    server: Server
    key: str
    models_dir: Path
    id: str
    output: str

    @classmethod
    def post(cls, server: Server, key: str, models_dir: Path, fields: dict[str, Any]) -> "Job":
        """POST /v1/quantizations."""
        job = _ask(server, key, "POST", "", fields)
        return cls(server, key, models_dir, job["id"], fields["output"])

    def now(self) -> dict[str, Any]:
        """What the server says of it. SystemExit where it failed."""
        job = _ask(self.server, self.key, "GET", f"/{self.id}")
        if job["status"] == "failed":
            raise SystemExit(f"the job failed: {job['error']}")
        return job

    def cancel(self) -> None:
        """End it, and forget it."""
        _ask(self.server, self.key, "POST", f"/{self.id}/cancel")
        _ask(self.server, self.key, "DELETE", f"/{self.id}")

    def finished(self) -> list[float]:
        """When each finished block was written: seconds of time.time, in order."""
        stage = resumable(self.models_dir / self.output) / "quantize"
        return [path.stat().st_mtime for path in sorted(stage.glob("block-*.safetensors"))]

    def process(self) -> int | None:
        """The job's process, once there is one."""
        assert self.server.pid is not None
        for pid in children(self.server.pid):
            if _TASK in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def watch_memory(self, layers: int) -> dict[str, int]:
        """Until the job has ended: the most its process held, in all and up to the last block's end."""
        most: dict[str, int] = {}
        pid, looked = None, 0.0
        while True:
            pid = self.process() if pid is None else pid
            if pid is not None and (seen := _memory(pid)) is not None:
                if len(self.finished()) < layers:
                    most |= {"blocks": seen["VmHWM"]}
                    most["blocks_anonymous"] = max(seen["RssAnon"], most.get("blocks_anonymous", 0))
                most |= {"whole": seen["VmHWM"]}
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                if self.now()["status"] == "succeeded":
                    return most
            time.sleep(TICK)


def empty_process() -> int:
    """What a job's process holds that has imported everything and waits for its options."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "nybble.engine.tasks", "quantize"],
        stdin=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        before, size = -1, 0
        while size != before or size == 0:  # it grows while it imports
            time.sleep(2.0)
            seen = _memory(process.pid)
            before, size = size, 0 if seen is None else seen["VmHWM"]
        process.kill()
    return size


def bound(config: dict[str, Any], num_tokens: int) -> dict[str, int]:
    """Bytes that a job may hold beside its empty process: three blocks, Hessians, activations."""
    known = ModelConfig.from_dict(config)
    hidden, ffn = known.hidden_size, known.intermediate_size
    heads, kv_heads = known.num_heads * known.head_dim, known.num_kv_heads * known.head_dim
    block = 4 * hidden * (2 * heads + 2 * kv_heads + 3 * ffn)
    parts = {
        "three_blocks": 3 * block,
        "hessians": 4 * _HESSIANS * max(hidden, heads, ffn) ** 2,
        "activations": activation_bytes(known, num_tokens),
    }
    return {**parts, "together": sum(parts.values())}


def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Until it holds. SystemExit after so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {seconds:.0f} s")
        time.sleep(TICK)


def _ask(server: Server, key: str, method: str, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{server.url}/v1/quantizations{path}",
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{method} {path}: {error.code} {error.read().decode()[:300]}") from error


def _memory(pid: int) -> dict[str, int] | None:
    """Bytes by name of /proc/PID/status; None once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return sizes if "VmHWM" in sizes else None
